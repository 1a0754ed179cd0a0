"""Stacks as files and words, and the models that they open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokdyn
from tokdyn import DCDiT, DiT, DynamicWidth, FeatureCache, TokenMerge
from tokdyn.attach import attached
from tokdyn.bench.stacks import open_stack, read_stacks
from tokdyn.errors import RecipeError, TokdynError

SHAPE = {"sample_size": 16, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def dit(tmp_path: Path) -> str:
    torch.manual_seed(0)
    DiT(**SHAPE, patch_size=2).save_pretrained(tmp_path / "dit")
    return str(tmp_path / "dit")


def test_a_file_and_a_word(tmp_path: Path, dit: str) -> None:
    file = tmp_path / "stacks.yaml"
    file.write_text(
        "stacks:\n  - {name: plain}\n  - {name: cached, methods: [{method: FeatureCache, threshold: 0.2}]}\n"
    )
    stacks = read_stacks([str(file), "{name: merged, methods: [{method: TokenMerge, ratio: 0.3}]}"])
    assert [stack.name for stack in stacks] == ["plain", "cached", "merged"]
    plain, cached, merged = (open_stack(stack, dit) for stack in stacks)
    assert tokdyn.attach.attachment_of(plain.model) is None
    assert attached(cached.model).methods == (FeatureCache(threshold=0.2),)
    assert attached(merged.model).methods == (TokenMerge(ratio=0.3),)
    assert not plain.model.training


def test_methods_go_around_those_that_were_trained(tmp_path: Path) -> None:
    """The trained part stays as it is, whether the methods come as words or the stack from a folder."""
    torch.manual_seed(0)
    model = tokdyn.wrap(DCDiT(**SHAPE, patch_size=1), [DynamicWidth(target=0.5)])
    with torch.no_grad():
        for parameter in attached(model).parameters():
            parameter.add_(torch.randn_like(parameter))
    tokdyn.save(model, tmp_path / "dc" / "methods")
    tokdyn.unwrap(model).save_pretrained(tmp_path / "dc")
    (stack,) = read_stacks(["{name: full, tail_drop: 0.3, methods: [{method: FeatureCache, threshold: 0.2}]}"])
    opened = open_stack(stack, str(tmp_path / "dc"))
    assert attached(opened.model).methods == (FeatureCache(threshold=0.2), DynamicWidth(target=0.5))
    tokdyn.save(opened.model, tmp_path / "both")
    from_folder = open_stack(read_stacks([f"{{name: both, folder: {tmp_path / 'both'}}}"])[0], str(tmp_path / "dc"))
    for name, value in attached(opened.model).state_dict().items():
        assert torch.equal(value, attached(from_folder.model).state_dict()[name])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nowhere.yaml", "nowhere.yaml cannot be read"),
        ("{name: a, methods: [{method: Merge}]}", "there is no method 'Merge'"),
        ("{name: a, methods: [{method: TokenMerge, ratio: 2}]}", r"values of the curve 2.0 .*\[0, 0.999\]\.$"),
        ("{name: a, tail_drop: 2}", "tail_drop"),
        ("{nome: a}", "nome"),
        ("{name: a", "the stack"),
    ],
)
def test_what_is_no_stack_is_said(word: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_stacks([word])


def test_names_differ_and_models_are_there(dit: str) -> None:
    with pytest.raises(RecipeError, match="two stacks are called a"):
        read_stacks(["{name: a}", "{name: a}"])
    (stack,) = read_stacks(["{name: a}"])
    with pytest.raises(RecipeError, match="names no model"):
        open_stack(stack)
    (dropping,) = read_stacks(["{name: a, tail_drop: 0.5}"])
    with pytest.raises(TokdynError, match="computes"):
        open_stack(dropping, dit)
