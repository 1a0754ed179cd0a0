"""Adapters that users register: precedence, names, checks of a declaration, and use by `wrap` and `load`."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tokdyn
from tests.contract.test_inferred_own import Model, build, inputs
from tokdyn import DepthSkip, InputError, TokenMerge, UnsupportedModelError
from tokdyn.adapters import ADAPTERS, Blocks, Follow, ModelAdapter, adapter_for, known_adapters, registry


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", [])


def adapter(**changes):
    settings = {
        "name": "mine",
        "classes": ("Model",),
        "blocks": (Blocks("blocks", tokens="x", attention=("attn",), mlp=("mlp",)),),
        "grid": lambda model, call: (call["x"].shape[2] // 2, call["x"].shape[3] // 2),
        "level": lambda model, call: call["t"] / 1000,
    }
    return ModelAdapter(**{**settings, **changes})


def test_a_registered_adapter_allows_methods_that_inference_refuses(tmp_path):
    with pytest.raises(UnsupportedModelError):
        tokdyn.wrap(build(Model), [TokenMerge()])
    mine = adapter()
    assert tokdyn.register_adapter(mine) is mine
    model = tokdyn.wrap(build(Model), [TokenMerge(), DepthSkip(blocks=(1,), levels=(0.4, 0.6))])
    with torch.no_grad():
        expected = model(*inputs())
        assert tokdyn.stats(model).calls[0].attention_tokens == 12
        assert torch.equal(tokdyn.load(build(Model), tokdyn.save(model, tmp_path))(*inputs()), expected)


def test_later_adapters_take_precedence_and_subclasses_match():
    class Sub(Model):
        pass

    first, second = adapter(), adapter(name="also mine")
    tokdyn.register_adapter(first)
    tokdyn.register_adapter(second)
    assert adapter_for(build(Sub)) is second
    special = adapter(name="special", classes=("Sub",))
    tokdyn.register_adapter(special)
    assert adapter_for(build(Sub)) is special
    assert adapter_for(build(Model)) is second
    assert known_adapters()[:3] == (special, second, first)


def test_a_registered_adapter_takes_precedence_over_those_of_the_package():
    mine = adapter(name="my DiT", classes=("DiTTransformer2DModel",))
    tokdyn.register_adapter(mine)
    kind = type("DiTTransformer2DModel", (nn.Module,), {})
    assert adapter_for(kind()) is mine


def test_two_adapters_cannot_share_a_name():
    mine = adapter()
    for _ in range(2):  # registering the same object again changes nothing
        tokdyn.register_adapter(mine)
    tokdyn.register_adapter(ADAPTERS[0])
    assert known_adapters() == (mine, *ADAPTERS)
    for name in ("mine", ADAPTERS[3].name):
        with pytest.raises(InputError, match=repr(name)):
            tokdyn.register_adapter(adapter(name=name))
    with pytest.raises(InputError, match=r"Blocks.* tokdyn\.adapters\.ModelAdapter"):
        tokdyn.register_adapter(Blocks("blocks"))


@pytest.mark.parametrize("own", ADAPTERS, ids=lambda own: own.name)
def test_copies_of_an_adapter_of_the_package_are_the_adapter_itself(own):
    assert copy.deepcopy(own) is own
    assert pickle.loads(pickle.dumps(own)) is own


def test_copies_of_a_registered_adapter_are_equal_to_it():
    mine = tokdyn.register_adapter(adapter(grid=None, level=None))
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert other == mine
        assert other is not mine


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classes": "Model"}, "'mine'.*classes='Model'.* str"),
        ({"classes": ()}, r"classes=\(\).* str"),
        ({"blocks": Blocks("blocks")}, "blocks=Blocks.* Blocks"),
    ],
)
def test_declarations_are_checked(changes, named):
    with pytest.raises(InputError, match=named):
        adapter(**changes)


def test_returned_text_has_to_be_an_argument_too():
    with pytest.raises(InputError, match=r"'blocks'.*'text'.*'tokens'"):
        Blocks("blocks", text="context", returns=("text",))
    with pytest.raises(InputError, match=r"'blocks'.*text="):
        Blocks("blocks", returns=("tokens", "text"))
    assert Blocks("blocks", follow=(Follow("rope"),)).returns == ("tokens",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"blocks": (Blocks("layers", tokens="x"),)}, "'layers'"),
        ({"blocks": (Blocks("embed", tokens="x"),)}, "'embed'"),
        ({"blocks": (Blocks("blocks", tokens="hidden"),)}, "'hidden'.*Block.* x, c"),
        ({"grid": None}, "'mine'.* grid="),
        ({"blocks": (Blocks("blocks", tokens="x", attention=("a",)),)}, "0 to 3.* attention"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_anything_changes(changes, named):
    tokdyn.register_adapter(adapter(**changes))
    model = build(Model)
    with pytest.raises(UnsupportedModelError, match=named):
        tokdyn.wrap(model, [TokenMerge()])
    assert type(model) is Model
