"""Adapters that users register: asked first, kept apart by name, good for `load` too."""

import pytest
import torch
from torch import nn

import tokdyn
from tests.contract.test_inferred_own import Model, build, inputs
from tokdyn import DepthSkip, InputError, TokenMerge, UnsupportedModelError
from tokdyn.adapters import ADAPTERS, Follow, ModelAdapter, Stack, adapter_for, known_adapters, registry


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", [])


def adapter(**changes):
    settings = {
        "name": "mine",
        "classes": ("Model",),
        "stacks": (Stack("blocks", tokens="x", attention=("attn",), mlp=("mlp",)),),
        "grid": lambda model, call: (call["x"].shape[2] // 2, call["x"].shape[3] // 2),
        "level": lambda model, call: call["t"] / 1000,
    }
    return ModelAdapter(**{**settings, **changes})


def test_a_registered_adapter_allows_what_an_inferred_one_does_not(tmp_path):
    with pytest.raises(UnsupportedModelError):
        tokdyn.wrap(build(Model), [TokenMerge()])
    mine = adapter()
    assert tokdyn.register_adapter(mine) is mine
    model = tokdyn.wrap(build(Model), [TokenMerge(), DepthSkip(blocks=(1,), levels=(0.4, 0.6))])
    with torch.no_grad():
        expected = model(*inputs())
        assert tokdyn.stats(model).calls[0].attention_tokens == 12
        assert torch.equal(tokdyn.load(build(Model), tokdyn.save(model, tmp_path))(*inputs()), expected)


def test_later_ones_are_asked_first_and_subclasses_count():
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


def test_a_registered_adapter_comes_before_those_of_the_package():
    mine = adapter(name="my DiT", classes=("DiTTransformer2DModel",))
    tokdyn.register_adapter(mine)
    kind = type("DiTTransformer2DModel", (nn.Module,), {})
    assert adapter_for(kind()) is mine


def test_names_are_kept_apart():
    mine = adapter()
    for _ in range(2):  # the same object again changes nothing
        tokdyn.register_adapter(mine)
    tokdyn.register_adapter(ADAPTERS[0])
    assert known_adapters() == (mine, *ADAPTERS)
    for name in ("mine", ADAPTERS[3].name):
        with pytest.raises(InputError, match=f"there is an adapter called '{name}' already"):
            tokdyn.register_adapter(adapter(name=name))
    with pytest.raises(InputError, match=r"got a Stack; register_adapter takes a tokdyn.adapters.ModelAdapter"):
        tokdyn.register_adapter(Stack("blocks"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": "Model"}, "classes of the adapter 'mine' is 'Model'; give a tuple of str"),
        ({"classes": ()}, "give a tuple of str"),
        ({"stacks": Stack("blocks")}, "give a tuple of Stack"),
    ],
)
def test_declarations_are_checked(changes, words):
    with pytest.raises(InputError, match=words):
        adapter(**changes)


def test_stacks_are_checked():
    with pytest.raises(InputError, match="'tokens' has to be among it"):
        Stack("blocks", text="context", returns=("text",))
    with pytest.raises(InputError, match="return text, but take none"):
        Stack("blocks", returns=("tokens", "text"))
    assert Stack("blocks", follow=(Follow("rope"),)).returns == ("tokens",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stacks": (Stack("layers", tokens="x"),)}, "blocks are in 'layers', and there is no list of modules there"),
        ({"stacks": (Stack("embed", tokens="x"),)}, "no list of modules there"),
        ({"stacks": (Stack("blocks", tokens="hidden"),)}, "hold tokens in 'hidden', but Block takes x, c"),
        ({"grid": None}, "its adapter 'mine' has no grid="),
        ({"stacks": (Stack("blocks", tokens="x", attention=("a",)),)}, "none of its blocks 0 to 3 has an attention"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused_before_anything_changes(changes, words):
    tokdyn.register_adapter(adapter(**changes))
    model = build(Model)
    with pytest.raises(UnsupportedModelError, match=words):
        tokdyn.wrap(model, [TokenMerge()])
    assert type(model) is Model
