"""The matrix of families and methods agrees with `wrap`, with the command line and with docs/adapters.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

import tokdyn
from tests.contract.models import TINY
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge, UnsupportedModelError
from tokdyn.adapters import ADAPTERS, Blocks, ModelAdapter
from tokdyn.attach import support, unsupported
from tokdyn.catalog import families, methods
from tokdyn.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"


def markdown() -> str:
    """Format the matrix as the page shows it."""
    header = ["family", *METHODS]
    lines = [header, ["---"] * len(header), *([family.name, *family.methods.values()] for family in families())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_page_shows_the_matrix() -> None:
    shown = re.search(r"<!-- support:.*?-->\n(.*?)<!-- end", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == markdown(), f"the matrix in {PAGE.name} should be:\n{markdown()}"


def test_the_matrix_has_every_adapter_and_every_method() -> None:
    assert {(cell.family, cell.method) for cell in support()} == {(a.name, m) for a in ADAPTERS for m in METHODS}


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_wrap_agrees_with_the_matrix(adapter: ModelAdapter) -> None:
    """On a real model, `wrap` accepts what the matrix accepts and refuses the rest for the same reason."""
    name = next(name for name in adapter.classes if name in TINY)
    for method in (each for known in METHODS.values() for each in known.examples()):
        model, reason = TINY[name].build(), unsupported(adapter, method)
        if reason is None:
            tokdyn.unwrap(tokdyn.wrap(model, [method]))
            continue
        with pytest.raises((UnsupportedModelError, tokdyn.CompositionError), match=re.escape(reason)):
            tokdyn.wrap(model, [method])
        assert "tokdyn" not in model._modules


def family(**changes: object) -> ModelAdapter:
    settings = {"name": "x", "classes": ("X",), "blocks": (Blocks("blocks"),), "grid": len, "level": len}
    return ModelAdapter(**{**settings, **changes})  # type: ignore[arg-type]


def test_each_property_of_a_family_rules_out_the_methods_that_it_should() -> None:
    assert unsupported(family(), TokenMerge(where="both")) is None
    without_mlp = str(unsupported(family(blocks=(Blocks("blocks", mlp=()),)), TokenMerge(where="both")))
    assert "MLP" in without_mlp
    assert "attention" not in without_mlp
    assert "grid=" in str(unsupported(family(grid=None), TokenMerge()))
    assert "register_adapter" in str(unsupported(family(grid=None, inferred=True), Chunking()))
    assert unsupported(family(grid=None, inferred=True), FeatureCache()) is None
    assert "where='attention'" in str(unsupported(family(dense=True), TokenMerge(where="mlp")))
    assert unsupported(family(dense=True), TokenMerge()) is None
    assert "noise level" in str(unsupported(family(level=None), DepthSkip(blocks=(0,), levels=(0.5, 1.0))))
    assert unsupported(family(level=None), DepthSkip(blocks=(0,))) is None
    assert "Chunking" in str(unsupported(family(chunked=True), Chunking()))


def test_a_method_that_needs_width_and_heads_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    model = type("X", (torch.nn.Module,), {})()
    model.blocks = torch.nn.ModuleList([Block(), Block()])
    monkeypatch.setattr("tokdyn.adapters.registry.REGISTERED", [family()])
    with pytest.raises(UnsupportedModelError, match=r"Chunking .*'x'.* width= .*heads="):
        tokdyn.wrap(model, [Chunking()])


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_models_lists_families() -> None:
    listed = json.loads(run("models", "--json"))
    entries = {entry["name"]: entry for entry in listed if entry["kind"] == "family"}
    assert set(entries) == {adapter.name for adapter in ADAPTERS}
    assert entries["Sana"]["methods"]["TokenMerge"] == "partly"
    assert "where='attention'" in entries["Sana"]["refused"]["TokenMerge(where='mlp')"]
    assert "noise level" in entries["timm ViT"]["refused"]["FeatureCache"]
    text = run("models")
    assert "VisionTransformer" in text
    assert "TokenMerge(where='mlp'), TokenMerge(where='both')" in text


def test_methods_lists_phases_stages_settings_and_families() -> None:
    entries = {entry["name"]: entry for entry in json.loads(run("methods", "--json"))}
    assert list(entries) == list(METHODS) == [entry.name for entry in methods()]
    assert entries["TokenDrop"]["acts"] == ["training"]
    assert entries["FeatureCache"]["acts"] == ["sampling"]
    assert entries["DepthSkip"]["stage"] == "block"
    assert entries["TokenMerge"]["settings"]["ratio"] == 0.5
    text = run("methods", "FeatureCache")
    assert text.startswith("FeatureCache: ")
    assert "TokenMerge:" not in text
    assert "timm ViT" in text
    assert re.search(r"threshold .*\[float, default 0\.1\]", text)
    assert re.search("'Nope'.* Chunking, TokenMerge", run("methods", "Nope", code=2))
