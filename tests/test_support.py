"""The matrix of families and methods agrees with what wrap does, with the command line and with the page on models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.coverage_videos import VIDEOS
from tests.contract.models import TINY
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge, UnsupportedModelError
from tokdyn.adapters import ADAPTERS, Blocks, ModelAdapter
from tokdyn.attach import support, unsupported
from tokdyn.catalog import families, methods
from tokdyn.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"


def markdown() -> str:
    """The matrix as the page shows it."""
    header = ["family", *METHODS]
    lines = [header, ["---"] * len(header), *([family.name, *family.methods.values()] for family in families())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_shows_the_matrix() -> None:
    shown = re.search(r"<!-- support:.*?-->\n(.*?)<!-- end", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == markdown(), f"put this between the two comments of {PAGE.name}:\n{markdown()}"


def test_every_adapter_and_every_method_is_in_it() -> None:
    assert {(each.family, each.method) for each in support()} == {(a.name, m) for a in ADAPTERS for m in METHODS}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_wrap_says_the_same(adapter: ModelAdapter) -> None:
    """For every kind of settings: refused with that reason, or attached, to a real model."""
    models = TINY | VIDEOS
    name = next(name for name in (adapter.name, *adapter.classes) if name in models)
    for method in (each for known in METHODS.values() for each in known.examples()):
        model, reason = models[name].build(), unsupported(adapter, method)
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
    entries = {each["name"]: each for each in json.loads(run("models", "--json")) if each["kind"] == "family"}
    assert set(entries) == {adapter.name for adapter in ADAPTERS}
    assert entries["Sana"]["methods"]["TokenMerge"] == "partly"
    assert "neighbouring cells" in entries["Sana"]["refused"]["TokenMerge(where='mlp')"]
    assert entries["timm ViT"]["refused"]["FeatureCache"].startswith("it depends on the noise level")
    text = run("models")
    assert "VisionTransformer" in text
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
    assert re.search(r"threshold +\S.*\[float, default 0\.1\]", text)
    assert "'Nope'" in run("methods", "Nope", code=2)
