"""Which tokens are left out and merged beside reference images: generated ones, and references among themselves."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import tokdyn
from tests.contract.kit import sample
from tests.contract.references import BESIDE, CALLS, COLUMNS, DENSE, ROWS, tokens_of_blocks
from tokdyn import Chunking, FeatureCache, TokenDrop, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.adapters.tokens import split
from tokdyn.methods import Method
from tokdyn.ops.destinations import grid_destinations
from tokdyn.ops.merging import match, merge
from tokdyn.tokens import total


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *product(["Kontext", "Qwen", "Wan", "LTX"], [Chunking(target=2)]),
        *product(sorted(BESIDE.keys() - {*DENSE, "Z-Image"}), [TokenDrop(rate=0.5, blocks=(0, -1))]),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_references_stay_whole_where_tokens_are_left_out(name: str, method: Method) -> None:
    model, call = CALLS[name].build().train(), CALLS[name].inputs(2)
    adapter = adapter_for(model)
    count, (first, last) = total(adapter.image_tokens(model, call)), BESIDE[name]
    text, whole = split(tokens_of_blocks(copy.deepcopy(model), call)[0], count, adapter.blocks[0].image)
    own = count - first - last
    tokens = tokens_of_blocks(tokdyn.wrap(model, [method]), call)[0]
    reduced = split(tokens, count - own // 2, adapter.blocks[0].image)[1]
    assert reduced.shape[1] == tokens.shape[1] - (0 if text is None else text.shape[1])
    assert torch.equal(reduced[:, :first], whole[:, :first])
    assert torch.equal(reduced[:, reduced.shape[1] - last :], whole[:, whole.shape[1] - last :])
    stop = reduced.shape[1] - last
    for kept, all_tokens in zip(reduced[:, first:stop], whole[:, first : first + own], strict=True):
        assert all((token == all_tokens).all(dim=1).any() for token in kept)


@pytest.mark.parametrize("name", ["Kontext", "Flux 3"])
def test_tokens_that_are_left_out_might_as_well_not_have_been_given(name: str) -> None:
    """Beside references, those that are left in all blocks get what the model predicts for them alone."""
    model, call = CALLS[name].build().train(), CALLS[name].inputs(1)
    own = ROWS * COLUMNS
    whole = tokens_of_blocks(copy.deepcopy(model), call)[0][0]
    seen: list[Tensor] = []
    dropping = tokdyn.wrap(copy.deepcopy(model), [TokenDrop(rate=0.5, blocks=(0, -1))])
    first = dropping.get_submodule(adapter_for(model).blocks[0].path)[0]  # type: ignore[index]
    first.register_forward_pre_hook(lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True)
    out = sample(dropping(**call))
    kept = (whole[:own, None] == seen[0][0]).all(dim=2).any(dim=1).nonzero().flatten()
    assert len(kept) == own // 2
    given = torch.cat([kept, torch.arange(own, call["hidden_states"].shape[1])])
    fewer = {**call, "hidden_states": call["hidden_states"][:, given], "img_ids": call["img_ids"][given]}
    expected = sample(model(**fewer))[:, : len(kept)]
    torch.testing.assert_close(out[:, kept], expected, rtol=0, atol=1e-5)  # fp32


@torch.no_grad()
def test_references_that_join_later_are_not_merged() -> None:
    """Attention of the first joint block of Flux 3 gets text, references and merged tokens."""
    call = CALLS["Flux 3"].inputs(2)

    def attention(methods: list[Method]) -> Tensor:
        model, seen = tokdyn.wrap(CALLS["Flux 3"].build(), methods), list[Tensor]()
        joint = model.single_transformer_blocks[0].attn  # type: ignore[index,union-attr]
        joint.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
        model(**call)
        return seen[0]

    text, own, references = attention([]).split([6, ROWS * COLUMNS, 16], dim=1)
    rows = own.flatten(0, 1)
    plan = match(rows, [own.shape[1]] * 2, grid_destinations(2, (ROWS, COLUMNS), rows.device), 0.5)
    expected = torch.cat([text, references, merge(rows, plan).view(2, -1, own.shape[2])], dim=1)
    found = attention([TokenMerge(ratio=0.5, blocks=(2, 3))])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # fp32


@pytest.mark.parametrize("references", ["keep", "merge"])
@pytest.mark.parametrize("name", ["Qwen", "Wan", "LTX-2"])
@torch.no_grad()
def test_attention_gets_tokens_merged_within_one_image(name: str, references: Any) -> None:
    """The first block's attention gets what the plain functions make of each image by itself."""
    sublayer = "attn" if name == "Qwen" else "attn1"
    plain, call = CALLS[name].build(), CALLS[name].inputs(2)
    whole = tokens_of_blocks(plain, call, sublayer)[0]
    model = tokdyn.wrap(CALLS[name].build(), [TokenMerge(ratio=0.5, references=references)])
    found = tokens_of_blocks(model, call, sublayer)[0]
    images = adapter_for(model).image_tokens(model, call)
    grids = [*images.references[: images.leading], images.grid, *images.references[images.leading :]]
    expected = []
    for number, (grid, part) in enumerate(
        zip(grids, whole.split([torch.Size(grid).numel() for grid in grids], dim=1), strict=True)
    ):
        rows = part.reshape(-1, part.shape[-1])
        plan = match(rows, [part.shape[1]] * 2, grid_destinations(2, grid, rows.device), 0.5)
        merged = merge(rows, plan).view(2, -1, part.shape[-1])
        expected.append(merged if number == images.leading or references == "merge" else part)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), rtol=0, atol=1e-6)  # fp32


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_nothing_changes_where_nothing_is_merged_or_left_out(name: str) -> None:
    """Bit for bit: no sequence is rotated either, for attention would add in another order."""
    call = CALLS[name].inputs(2)
    plain = sample(CALLS[name].build()(**call))
    outside: list[list[Method]] = [[FeatureCache(threshold=-1.0), Chunking(target=1)], [TokenDrop(rate=0.0)]]
    around: list[Method] = [FeatureCache(threshold=-1.0), TokenMerge(ratio=0.0, references="merge")]
    for methods in [around] if name in DENSE else [*outside, around]:
        assert torch.equal(sample(tokdyn.wrap(CALLS[name].build(), methods)(**call)), plain)
