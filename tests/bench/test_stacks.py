"""Stacks are read from files and inline YAML, and open models with their methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokdyn
from tokdyn import DCDiT, DiT, DynamicWidth, FeatureCache, TokenMerge
from tokdyn.bench.stacks import open_stack, read_stacks
from tokdyn.errors import RecipeError, TokdynError

SHAPE = {"sample_size": 16, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def dit(tmp_path: Path) -> str:
    torch.manual_seed(0)
    DiT(**SHAPE, patch_size=2).save_pretrained(tmp_path / "dit")
    return str(tmp_path / "dit")


def test_stacks_come_from_a_file_and_from_inline_yaml(tmp_path: Path, dit: str) -> None:
    file = tmp_path / "stacks.yaml"
    file.write_text(
        "stacks:\n  - {name: plain}\n  - {name: cached, methods: [{method: FeatureCache, threshold: 0.2}]}\n"
    )
    stacks = read_stacks([str(file), "{name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}"])
    assert [stack.name for stack in stacks] == ["plain", "cached", "merged"]
    plain, cached, merged = (open_stack(stack, dit) for stack in stacks)
    assert tokdyn.attach.attachment_of(plain.model) is None
    assert tokdyn.parts(cached.model) == [(FeatureCache(threshold=0.2), None)]
    assert tokdyn.parts(merged.model) == [(TokenMerge(ratio=0.3), None)]
    assert not plain.model.training


def test_methods_are_put_around_trained_ones(tmp_path: Path) -> None:
    """Trained parts keep their weights, whether methods come from inline YAML or from a folder."""
    torch.manual_seed(0)
    model = tokdyn.wrap(DCDiT(**SHAPE, patch_size=1), [DynamicWidth(target=0.5)])
    with torch.no_grad():
        for parameter in model.tokdyn.parameters():
            parameter.add_(torch.randn_like(parameter))
    tokdyn.save(model, tmp_path / "dc" / "methods")
    tokdyn.unwrap(model).save_pretrained(tmp_path / "dc")
    (stack,) = read_stacks(["{name: full, tail_drop: 0.3, methods: [{method: FeatureCache, threshold: 0.2}]}"])
    opened = open_stack(stack, str(tmp_path / "dc"))
    methods = [method for method, _ in tokdyn.parts(opened.model)]
    assert methods == [FeatureCache(threshold=0.2), DynamicWidth(target=0.5)]
    tokdyn.save(opened.model, tmp_path / "both")
    from_folder = open_stack(read_stacks([f"{{name: both, folder: {tmp_path / 'both'}}}"])[0], str(tmp_path / "dc"))
    for name, value in opened.model.tokdyn.state_dict().items():
        assert torch.equal(value, from_folder.model.tokdyn.state_dict()[name])


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("nowhere.yaml", "nowhere.yaml"),
        ("{name: a, methods: [{method: Merge}]}", "'Merge'"),
        ("{name: a, methods: [{method: TokenMerge, ratio: 2}]}", r"2.0 .*\[0, 0.999\]\.$"),
        ("{name: a, tail_drop: 2}", "tail_drop"),
        ("{nome: a}", "nome"),
        ("{name: a", "the stack"),
    ],
)
def test_invalid_stacks_are_refused(argument: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        read_stacks([argument])


def test_repeated_names_missing_models_and_useless_tail_drops_are_refused(dit: str) -> None:
    with pytest.raises(RecipeError, match=r"\ba\b"):
        read_stacks(["{name: a}", "{name: a}"])
    (stack,) = read_stacks(["{name: a}"])
    with pytest.raises(RecipeError, match=r"stack a .*model"):
        open_stack(stack)
    (dropping,) = read_stacks(["{name: a, tail_drop: 0.5}"])
    with pytest.raises(TokdynError, match="DiT"):
        open_stack(dropping, dit)
    (preset,) = read_stacks(["{name: a, methods: fast}"])
    with pytest.raises(RecipeError, match="methods=fast, a preset"):
        open_stack(preset, dit)
