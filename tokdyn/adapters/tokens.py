"""Tensors with an entry for every token: text and image tokens, and arguments that must stay with their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.base import Blocks, Follow
from tokdyn.errors import InputError
from tokdyn.ops.dropping import take


def split(x: Tensor, count: int | None, image: str) -> tuple[Tensor | None, Tensor]:
    """Split tokens (B, S, D) into text tokens, None where there are none, and `count` image tokens."""
    if image == "all" or count is None:
        return None, x
    text = x.shape[1] - count
    if text < 0:
        raise InputError(
            f"the grid has {count} cells, but a block gets {x.shape[1]} tokens, so the adapter does not fit the call."
        )
    if not text:
        return None, x
    if image == "first":
        return x[:, count:], x[:, :count]
    return x[:, :text], x[:, text:]


def join(text: Tensor | None, x: Tensor, image: str) -> Tensor:
    """Join text and image tokens, the inverse of `split`."""
    if text is None:
        return x
    return torch.cat([x, text] if image == "first" else [text, x], dim=1)


def follow(value: Any, how: Follow, blocks: Blocks, index: Tensor, count: int) -> Any:
    """Select the entries of some tokens of an argument that has one for every token.

    Args:
        value: None, a tensor or a tuple or list of tensors.
        how: says where its tokens are.
        blocks: says where image tokens lie beside text.
        index: (B, M) image tokens that stay, rising.
        count: N, image tokens that `value` has entries for.

    Returns:
        The same structure, with M entries for the image tokens.
    """
    if isinstance(value, (tuple, list)):
        chosen = range(len(value)) if how.item is None else (how.item,)
        return type(value)(
            follow(part, how, blocks, index, count) if place in chosen else part for place, part in enumerate(value)
        )
    if isinstance(value, PerSample):  # an enclosing method has selected before
        return PerSample.of(follow(value.table, replace(how, axis=how.axis + 1, batched=True), blocks, index, count))
    if not isinstance(value, Tensor) or value.dim() != (how.dims or value.dim()) or value.shape[how.axis] < count:
        return value
    axis = how.axis
    if not how.batched:
        value, axis = value.unsqueeze(0), axis + 1
    moved = value.movedim(axis, 1)
    if len(moved) != len(index):
        moved = moved.expand(len(index), *moved.shape[1:])
    text = moved.shape[1] - count
    place = index
    if text:
        offset = text if blocks.joint == "last" else 0
        beside = torch.arange(text, device=index.device) + (0 if blocks.joint == "last" else count)
        parts = [beside.expand(len(index), -1), index + offset]
        place = torch.cat(parts if blocks.joint == "last" else parts[::-1], dim=1)
    selected = take(moved.contiguous(), place).movedim(1, axis)
    return selected if how.batched else PerSample.of(selected)


def of_samples(named: Mapping[str, Any], rows: Tensor, batch: int, blocks: Blocks) -> dict[str, Any]:
    """Select the entries of some samples of a batch; what has no batch is shared by all.

    Args:
        named: arguments by name.
        rows: (b,) int64, the samples.
        batch: B.
        blocks: says which arguments have no batch, and which have several entries per sample.
    """
    shared = {how.name for how in blocks.follow if not how.batched}
    selected: dict[int, Any] = {}  # one object under two names stays one
    for name, value in named.items():
        if id(value) not in selected:
            several = name in blocks.rounds and isinstance(value, Tensor) and len(value) > batch
            chosen = torch.cat([rows + start for start in range(0, len(value), batch)]) if several else rows
            selected[id(value)] = _rows(value, chosen, len(value) if several else batch, name in shared)
    return {name: selected[id(value)] for name, value in named.items()}


def _rows(value: Any, rows: Tensor, batch: int, shared: bool) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, batch, shared) for part in value)
    if isinstance(value, PerSample):
        return PerSample.of(value.table.index_select(0, rows))
    if isinstance(value, Tensor) and not shared and value.dim() and value.shape[0] == batch:
        return value.index_select(0, rows)
    return value


class PerSample:
    """A table (B, S, ...) in the place of one (S, ...) that models write without a batch.

    It answers the ways in which rotary embeddings are read: `table[None, None]`, `table[None, :, None]`,
    `table.unsqueeze(1)` and `table.to(device)`.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @staticmethod
    def of(table: Tensor) -> Tensor | PerSample:
        """Wrap a table, unless it is of a single sample, which needs no batch."""
        return table[0] if len(table) == 1 else PerSample(table)

    def __getitem__(self, key: Any) -> Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        assert keys[0] is None, "a rotary table is read in a way that is not known"
        return self.table[(slice(None), *keys[1:])]

    def unsqueeze(self, axis: int) -> Tensor:
        """Insert an axis, counted as if there were no batch."""
        return self.table.unsqueeze(axis + 1 if axis >= 0 else axis)

    def to(self, *args: Any, **kwargs: Any) -> PerSample:
        """Move the table to another device or type."""
        return PerSample(self.table.to(*args, **kwargs))
