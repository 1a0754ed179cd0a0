"""The matrix of families and methods agrees with what wrap does, with the command line and with the page on models."""

from __future__ import annotations

import json
import re

import diffusers
import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.stacks import KNOWN
from tests.support_table import PAGE, PART, markdown
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge, UnsupportedModelError
from tokdyn.adapters import ADAPTERS, Blocks, ModelAdapter
from tokdyn.adapters.undeclared import DIFFUSERS, UNDECLARED
from tokdyn.attach import support, unsupported
from tokdyn.catalog import classes, methods
from tokdyn.methods import METHODS


def test_the_page_shows_the_matrix() -> None:
    shown = PART.search(PAGE.read_text())
    assert shown is not None
    assert shown[2].strip() == markdown(), f"python tests/support_table.py writes the matrix of {PAGE.name} anew"


def exported() -> set[str]:
    """The names of the models among the transformers of diffusers that it exports."""
    from diffusers.models import transformers

    models = {name for name, kind in vars(transformers).items() if isinstance(kind, type)}
    models = {name for name in models if issubclass(getattr(transformers, name), diffusers.ModelMixin)}
    return models & set(dir(diffusers))


@pytest.mark.skipif(
    not diffusers.__version__.startswith(f"{DIFFUSERS}."), reason=f"the matrix lists the classes of {DIFFUSERS}"
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, of names that it is giving up
def test_every_transformer_of_diffusers_is_in_it() -> None:
    declared = {name for adapter in ADAPTERS for name in adapter.classes}
    assert exported() - declared - UNDECLARED.keys() == set()
    assert UNDECLARED.keys() - exported() == set()


def test_no_class_is_both_declared_and_not() -> None:
    """Leave a class out of UNDECLARED once it has an adapter."""
    assert UNDECLARED.keys() & {name for adapter in ADAPTERS for name in adapter.classes} == set()


def test_every_adapter_and_every_method_is_in_it() -> None:
    assert {(each.family, each.method) for each in support()} == {(a.name, m) for a in ADAPTERS for m in METHODS}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_wrap_says_the_same(adapter: ModelAdapter) -> None:
    """For every kind of settings: refused with that reason, or attached, to a real model."""
    name = next(name for name in (adapter.name, *adapter.classes) if name in KNOWN)
    model = KNOWN[name].build()
    for method in (each for known in METHODS.values() for each in known.examples()):
        reason = unsupported(adapter, method)
        if reason is None:
            tokdyn.unwrap(tokdyn.wrap(model, [method]))
            continue
        with pytest.raises((UnsupportedModelError, tokdyn.CompositionError), match=re.escape(reason)):
            tokdyn.wrap(model, [method])
        assert not hasattr(model, "tokdyn")


def family(**changes: object) -> ModelAdapter:
    settings = {"name": "x", "classes": ("X",), "blocks": (Blocks("blocks"),), "grid": len, "level": len}
    return ModelAdapter(**{**settings, **changes})  # type: ignore[arg-type]


def test_reasons() -> None:
    assert unsupported(family(), TokenMerge(where="both")) is None
    reason = unsupported(family(blocks=(Blocks("blocks", mlp=()),)), TokenMerge(where="both"))
    assert reason is not None
    assert "MLP" in reason
    assert "attention" not in reason
    assert "no grid=" in str(unsupported(family(grid=None), TokenMerge()))
    assert "docs/adapters.md" in str(unsupported(family(grid=None, inferred=True), Chunking()))
    assert unsupported(family(grid=None, inferred=True), FeatureCache()) is None
    assert "neighbouring cells" in str(unsupported(family(dense=True), TokenMerge(where="mlp")))
    assert unsupported(family(dense=True), TokenMerge()) is None
    assert "none" in str(unsupported(family(level=None), DepthSkip(blocks=(0,), levels=(0.5, 1.0))))
    assert unsupported(family(level=None), DepthSkip(blocks=(0,))) is None
    assert "token grid" in str(unsupported(family(chunked=True), Chunking()))


def test_a_method_that_needs_sizes_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    model = type("X", (torch.nn.Module,), {})()
    model.blocks = torch.nn.ModuleList([Block(), Block()])
    monkeypatch.setattr("tokdyn.adapters.registry.REGISTERED", [family()])
    with pytest.raises(UnsupportedModelError, match=r"Chunking .* give the adapter 'x' width= and heads="):
        tokdyn.wrap(model, [Chunking()])


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_models_lists_families() -> None:
    listed = json.loads(run("models", "--json"))
    entries = {each["name"]: each for each in listed if each["kind"] == "family"}
    assert set(entries) == {adapter.name for adapter in ADAPTERS}
    assert entries["Sana"]["methods"]["TokenMerge"] == "partly"
    assert "neighbouring cells" in entries["Sana"]["refused"]["TokenMerge(where='mlp')"]
    assert entries["timm ViT"]["refused"]["FeatureCache"].startswith("it depends on the noise level")
    others = {each["name"]: each for each in listed if each["kind"] == "class"}
    assert set(others) == set(UNDECLARED) == {each.name for each in classes()}
    assert [name for name, works in others["PriorTransformer"]["methods"].items() if works == "yes"] == [
        "DepthSkip",
        "FeatureCache",
    ]
    text = run("models")
    assert "VisionTransformer" in text
    assert "PriorTransformer: DepthSkip, FeatureCache; " in text
    assert "not TokenMerge(where='mlp'), TokenMerge(where='both'): " in text


def test_methods_lists_what_acts_when_and_where() -> None:
    entries = {each["name"]: each for each in json.loads(run("methods", "--json"))}
    assert list(entries) == list(METHODS) == [each.name for each in methods()]
    assert entries["TokenDrop"]["acts"] == ["training"]
    assert entries["FeatureCache"]["acts"] == ["sampling"]
    assert entries["DepthSkip"]["stage"] == "block"
    assert entries["TokenMerge"]["settings"]["ratio"] == 0.5
    text = run("methods", "FeatureCache")
    assert text.startswith("FeatureCache: ")
    assert "TokenMerge:" not in text
    assert re.search(r"not on +timm ViT\n", text)
    assert re.search(r" threshold \S[^[]*\[float, default 0\.1\]", " ".join(text.split()))
    assert "'Nope'" in run("methods", "Nope", code=2)
