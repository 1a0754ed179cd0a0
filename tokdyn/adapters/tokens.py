"""Split, join and select tensors along their token axis.

An entry is the slice of a tensor that belongs to one token, such as one row of a rotary table.
"""

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
    """Split a sequence (B, S, D) into its text tokens and its image tokens.

    Args:
        x: the sequence.
        count: number of image tokens; None if there are only image tokens.
        image: where the image tokens are: "first", "last", or "all" if there are only image tokens.

    Returns:
        Text tokens (B, S - count, D), None if there are none, and image tokens (B, count, D). Both are views of x.

    Raises:
        InputError: the sequence is shorter than `count`.
    """
    if image == "all" or count is None:
        return None, x
    text = x.shape[1] - count
    if text < 0:
        raise InputError(
            f"the grid has {count} cells, but a block gets {x.shape[1]} tokens; correct grid= or image= in the adapter."
        )
    if not text:
        return None, x
    if image == "first":
        return x[:, count:], x[:, :count]
    return x[:, :text], x[:, text:]


def join(text: Tensor | None, x: Tensor, image: str) -> Tensor:
    """Join text tokens (B, L, D), or None, and image tokens (B, N, D) into one sequence; the inverse of `split`."""
    if text is None:
        return x
    return torch.cat([x, text] if image == "first" else [text, x], dim=1)


def select_tokens(value: Any, argument: Follow, blocks: Blocks, index: Tensor, count: int) -> Any:
    """Select the entries of some image tokens from an argument with a token axis. Entries of text tokens stay.

    Args:
        value: the argument: a tensor, a tuple, list or dictionary of tensors, a `PerSample`, or a number of tokens.
            Anything else is returned unchanged, and so are tensors that `argument.dims` or `argument.item` leaves out
            and tensors with fewer than `count` entries.
        argument: which axis of the argument is its token axis.
        blocks: says in `joint` whether text tokens come before or after the image tokens on that axis, unless
            `argument.joint` does.
        index: (B, M) int64 image tokens to select, ascending.
        count: N, the image tokens that the argument has entries for.

    Returns:
        The same structure, with M entries for image tokens. An argument without a batch axis gains one, as a
        `PerSample` table, if B is not 1.
    """
    if isinstance(value, Mapping):
        return {name: select_tokens(part, argument, blocks, index, count) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        items, inner = range(len(value)) if argument.item is None else (argument.item,), replace(argument, item=None)
        return type(value)(
            select_tokens(part, inner, blocks, index, count) if place in items else part
            for place, part in enumerate(value)
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return index.shape[1] if value == count else value
    if isinstance(value, PerSample):  # an enclosing method has selected before
        batched = replace(argument, axis=argument.axis + 1, batched=True)
        return PerSample.of(select_tokens(value.table, batched, blocks, index, count))
    axis = argument.axis
    if not isinstance(value, Tensor) or value.dim() != (argument.dims or value.dim()) or value.shape[axis] < count:
        return value
    if not argument.batched:
        value, axis = value.unsqueeze(0), axis + 1
    moved = value.movedim(axis, 1)
    if len(moved) != len(index):
        moved = moved.expand(len(index), *moved.shape[1:])
    text, last = moved.shape[1] - count, (argument.joint or blocks.joint) == "last"
    place = index
    if text:
        beside = torch.arange(text, device=index.device) + (0 if last else count)
        parts = [beside.expand(len(index), -1), index + (text if last else 0)]
        place = torch.cat(parts if last else parts[::-1], dim=1)
    selected = take(moved.contiguous(), place).movedim(1, axis)
    return selected if argument.batched else PerSample.of(selected)


def select_samples(named: Mapping[str, Any], rows: Tensor, batch: int, blocks: Blocks) -> dict[str, Any]:
    """Select some samples from every argument whose first axis is the batch. Other arguments stay as they are.

    Args:
        named: the arguments of a block, by name.
        rows: (b,) int64 positions of the samples in the batch.
        batch: B; a tensor whose first axis has another length has no batch axis.
        blocks: says in `follow` which arguments have no batch axis whatever their shape, and which item of a tuple has
            one; and in `rounds` which have several entries per sample.

    Returns:
        All arguments, by name.
    """
    shared = {*blocks.shared, *(argument.name for argument in blocks.follow if not argument.batched)}
    items = {argument.name: argument.item for argument in blocks.follow if argument.item is not None}
    selected: dict[int, Any] = {}  # one object under two names stays one
    for name, value in named.items():
        if id(value) not in selected:
            several = name in blocks.rounds and isinstance(value, Tensor) and len(value) > batch
            chosen = torch.cat([rows + start for start in range(0, len(value), batch)]) if several else rows
            length = len(value) if several else batch
            if name in items and isinstance(value, (tuple, list)):
                parts = list(value)
                parts[items[name]] = _rows(parts[items[name]], chosen, length, name in shared)
                selected[id(value)] = type(value)(parts)
            else:
                selected[id(value)] = _rows(value, chosen, length, name in shared)
    return {name: selected[id(value)] for name, value in named.items()}


def _rows(value: Any, rows: Tensor, batch: int, shared: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _rows(part, rows, batch, shared) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, batch, shared) for part in value)
    if isinstance(value, PerSample):
        return PerSample.of(value.table.index_select(0, rows))
    if isinstance(value, Tensor) and not shared and value.dim() and value.shape[0] == batch:
        return value.index_select(0, rows)
    return value


class PerSample:
    """Tables (B, S, ...), one for each sample, for model code that expects a single table (S, ...).

    It supports the operations that models apply to rotary tables, in which a leading None gives the batch axis its
    place: `table[None, None]` is (B, 1, S, ...), `table[None, :, None]` is (B, S, 1, ...), and `table.unsqueeze(1)` is
    (B, S, 1, ...). An index that begins with a slice selects along S. Any other index fails an assertion. A product
    with queries (B, S, ...) takes each sample's table, and `shape` is that of one table.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @staticmethod
    def of(table: Tensor) -> Tensor | PerSample:
        """Wrap a table (B, S, ...); for one sample return the plain tensor (S, ...) instead."""
        return table[0] if len(table) == 1 else PerSample(table)

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if isinstance(keys[0], slice):
            selected = self.table[(slice(None), *keys)]
            return selected if len(keys) > 1 else PerSample(selected)
        assert keys[0] is None, f"a rotary table of one table per sample is indexed by {key!r}, which is not supported"
        return self.table[(slice(None), *keys[1:])]

    def __mul__(self, x: Tensor) -> Tensor:
        assert x.dim() == self.table.dim(), f"a table {tuple(self.shape)} is multiplied by a {x.dim()}-D tensor"
        return self.table * x

    __rmul__ = __mul__

    def float(self) -> PerSample:
        """Return a copy in fp32."""
        return PerSample(self.table.float())

    @property
    def shape(self) -> torch.Size:
        """The shape (S, ...) of the table of one sample."""
        return self.table.shape[1:]

    def unsqueeze(self, axis: int) -> Tensor:
        """Return a tensor with an axis inserted at `axis`, counted as in the table (S, ...) of one sample."""
        return self.table.unsqueeze(axis + 1 if axis >= 0 else axis)

    def to(self, *args: Any, **kwargs: Any) -> PerSample:
        """Return a copy on another device or with another dtype; takes the arguments of `Tensor.to`."""
        return PerSample(self.table.to(*args, **kwargs))
