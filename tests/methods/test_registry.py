"""A method has one name and one list of aliases, wherever it is written."""

import pytest
import torch

import tokdyn
from tokdyn import InputError
from tokdyn.bench.tune_settings import TuneConfig
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.methods import METHODS, Method, Stage, Traits, find_method, register_method
from tokdyn.methods.registry import from_settings, full_name, short_name
from tokdyn.upcycling.settings import split_methods

NAMES = [(name, method) for method in METHODS.values() for name in (method.__name__, *method.aliases)]


@pytest.mark.parametrize(("name", "method"), NAMES)
def test_every_name_finds_its_method_in_any_spelling(name, method):
    full = method.__name__
    for spelling in (name, full.lower(), full.upper(), f"{full[:5]}-{full[5:]}", f"{full[:5]}_{full[5:]}"):
        assert find_method(spelling) is method
    assert find_method(method.aliases[0].title()) is None
    assert from_settings({"method": name}) == method()
    assert full_name(name) == method.__name__
    assert short_name(name) == method.aliases[0]


def test_no_name_stands_for_two_methods():
    names = [name.lower() for name, _ in NAMES]
    assert len(set(names)) == len(names)


def test_what_names_no_method_stays_as_it_is():
    assert find_method("nothing") is None
    assert (full_name("nothing"), short_name(3)) == ("nothing", 3)


def test_the_command_line_recipes_and_knobs_take_every_name():
    for name in ("skip", "DepthSkip", "depth-skip"):
        assert CalibrateConfig(model="x", method=name, flops=0.7).method == "skip"
        assert split_methods([f"{name}=0.7"]) == ([], [{"method": "skip", "flops": 0.7}])
        assert TuneConfig(model="x", flops=0.7, knobs=[name]).knobs == ("skip",)
    assert split_methods(["Chunking", "DynamicWidth"]) == (["dc", "dydit"], [])


def test_upcycle_takes_every_name():
    torch.manual_seed(0)
    one = tokdyn.upcycle("shapes", "dc", target=4)
    torch.manual_seed(0)
    other = tokdyn.upcycle("shapes", "Chunking", target=4)
    assert one.config == other.config


def test_a_name_that_is_taken_is_refused():
    class Other(Method):
        aliases = ("tome",)

        def traits(self, depth):
            return Traits(Stage.BLOCK)

    with pytest.raises(InputError, match=r"'tome' .*TokenMerge"):
        register_method(Other)
    with pytest.raises(InputError, match="Method"):
        register_method(int)
    assert "Other" not in METHODS
