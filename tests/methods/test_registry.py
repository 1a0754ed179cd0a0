"""A method has one name and one list of aliases, wherever it is written."""

import json
from typing import Any

import pytest
import torch

import tokdyn
from tokdyn import InputError
from tokdyn.bench.tune_settings import TuneConfig
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.methods import (
    METHODS,
    Chunking,
    DepthSkip,
    DynamicWidth,
    FeatureCache,
    Method,
    Stage,
    TokenDrop,
    TokenMerge,
    Traits,
    find_method,
    register_method,
)
from tokdyn.methods.registry import from_settings, full_name, short_name, to_settings
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


def test_names_in_saved_files_and_commands_stay():
    assert {name: method.aliases for name, method in METHODS.items()} == {
        "Chunking": ("dc",),
        "TokenMerge": ("merge", "tome"),
        "TokenDrop": ("tread",),
        "DepthSkip": ("skip",),
        "DynamicWidth": ("dydit", "width"),
        "FeatureCache": ("cache", "teacache"),
    }


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


ODD = [
    Chunking(target=7.0, tail_drop=((0.0, 0.1), (1.0, 0.4)), sigma=None, router="cosine"),
    TokenMerge(ratio=((0.2, 0.3), (0.9, 0.1)), blocks=(1, -2), seed=3),
    TokenDrop(blocks=(-3, -1), rate=0.25),
    DepthSkip(table=((0.0, 0.5, (1, -1)), (0.5, 1.0, ())), fingerprint="model"),
    DynamicWidth(embedding=12, tokens=False),
    FeatureCache(steps=(0, 3), coefficients=(2.0, 1.0, 0.5)),
]


@pytest.mark.parametrize("method", [*ODD, *(cls() for cls in METHODS.values())], ids=lambda m: type(m).__name__)
def test_methods_are_written_for_json_and_read_back(method):
    written = to_settings(method)
    assert json.loads(json.dumps(written)) == written  # lists already, where JSON has no tuples
    assert written.pop("method") == type(method).__name__
    for name in (type(method).__name__, *method.aliases):
        found = from_settings({"method": name, **written})
        assert found == method
        assert hash(found) == hash(method)


def test_methods_of_others_get_tuples_for_lists():
    class Free(Method):
        aliases = ("gratis",)
        value: Any = None

    register_method(Free)
    try:
        found = from_settings({"method": "gratis", "value": [1, [2, [3]], "four"]})
        assert found.value == (1, (2, (3,)), "four")
        assert hash(found) == hash(Free(value=(1, (2, (3,)), "four")))
        assert register_method(Free) is Free  # again: the same method
        assert short_name("Free") == "gratis"
    finally:
        METHODS.pop("Free")


def test_a_method_without_aliases_has_its_full_name_for_a_short_one():
    class Lone(Method):
        pass

    register_method(Lone)
    try:
        assert (full_name("lone"), short_name("LONE")) == ("Lone", "Lone")
        assert find_method("lo-ne") is Lone
    finally:
        METHODS.pop("Lone")


@pytest.mark.parametrize("settings", [{"method": "nothing"}, {}, {"method": 3}, None, "dc", [("method", "dc")]])
def test_settings_that_name_no_method_list_those_there_are(settings):
    with pytest.raises(InputError, match=", ".join(METHODS)):
        from_settings(settings)


@pytest.mark.parametrize("wrong", [Method(), "TokenMerge", None])
def test_only_classes_of_methods_can_be_registered(wrong):
    with pytest.raises(InputError, match="subclass"):
        register_method(wrong)
