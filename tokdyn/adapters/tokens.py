"""Split, join and select tensors along their token axis.

An entry is the slice of a tensor that belongs to one token, such as one row of a rotary table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.arrangement import change_results
from tokdyn.adapters.base import Blocks, Follow
from tokdyn.errors import InputError
from tokdyn.lazy import Lazy
from tokdyn.ops.dropping import put_back, take
from tokdyn.tokens import ImageTokens


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


def apart(x: Tensor, beside: tuple[int, int], lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Split image tokens into the reference tokens before the generated ones, the generated ones, and those after them.

    Args:
        x: (B, M, ...) image tokens.
        beside: how many reference tokens there are before and after the generated tokens.
        lengths: number of image tokens of each sample, if they differ; entries behind them are padding.

    Returns:
        Reference tokens (B, r, ...), generated tokens with padding, and reference tokens.
    """
    before, after = beside
    if not before + after:
        return x[:, :0], x, x[:, :0]
    stop = x.shape[1] - after
    if lengths is None or not after:
        return x[:, :before], x[:, before:stop], x[:, stop:]
    slot = torch.arange(after, device=x.device) - after + torch.tensor(lengths, device=x.device)[:, None]
    return x[:, :before], x[:, before:stop], take(x, slot)


def together(first: Tensor, own: Tensor, last: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Join generated tokens with the reference tokens before and after them; the inverse of `apart`.

    Args:
        first: (B, r, ...).
        own: (B, M, ...) generated tokens.
        last: (B, r, ...).
        lengths: number of generated tokens of each sample, if they differ. Their padding comes behind all others.
    """
    if not first.shape[1] + last.shape[1]:
        return own
    x = torch.cat([first, own, last], dim=1)
    if lengths is None or not last.shape[1]:
        return x
    slot = torch.arange(x.shape[1], device=x.device)
    end = torch.tensor(lengths, device=x.device)[:, None] + first.shape[1]
    skipped = own.shape[1] + first.shape[1] - end
    reference, padding = slot + skipped, slot - last.shape[1]
    return take(x, torch.where(slot < end, slot, torch.where(slot < end + last.shape[1], reference, padding)))


def rotate(x: Tensor, by: Sequence[int], back: bool = False) -> Tensor:
    """Rotate the sequence of every sample of x (B, S, ...) to the left, by another number of places for each.

    Args:
        x: the sequences.
        by: the number of places for every sample, or one for all; () leaves x as it is.
        back: whether to rotate to the right.
    """
    if not by:
        return x
    if len(by) == 1:
        return x.roll(by[0] if back else -by[0], dims=1)
    places = torch.tensor(by, device=x.device)[:, None]
    slot = torch.arange(x.shape[1], device=x.device) + (-places if back else places)
    return take(x, slot.remainder(x.shape[1]))


def rotate_entries(value: Any, argument: Follow, by: Sequence[int], length: int) -> Any:
    """Rotate the entries of an argument with a token axis as `rotate` rotates the tokens.

    Args:
        value: the argument: a tensor, or a tuple or list of tensors if one number rotates all samples.
        argument: which axis of the argument is its token axis.
        by: the number of places for every sample, or one for all.
        length: S, the tokens of a sequence. Entries before the last S, such as those of text tokens that join the
            sequence within the block, stay, and so do tensors with fewer entries.
    """
    if len(by) != 1:
        return rotate(value, by)
    if isinstance(value, (tuple, list)):
        return type(value)(rotate_entries(part, argument, by, length) for part in value)
    axis = argument.axis
    if not isinstance(value, Tensor) or value.dim() != (argument.dims or value.dim()) or value.shape[axis] < length:
        return value
    start = value.shape[axis] - length
    own = value.narrow(axis, start, length).roll(-by[0], dims=axis)
    return torch.cat([value.narrow(axis, 0, start), own], dim=axis)


def gather(whole: Tensor, cells: int, index: Tensor | None, blocks: Blocks) -> Tensor:
    """Take some image tokens from a sequence with all of them, (B, S, D), text tokens included.

    Args:
        whole: the sequence.
        cells: N, image tokens in it.
        index: (B, M) int64 cells of the tokens to take; None takes all.
        blocks: the adapter's declaration of the block.
    """
    if index is None:
        return whole
    text, x = split(whole, cells, blocks.image)
    return join(text, take(x, index), blocks.image)


def scatter(
    tokens: Tensor, whole: Tensor, cells: int, index: Tensor | None, lengths: Sequence[int] | None, blocks: Blocks
) -> Tensor:
    """Put tokens back among all image tokens of `whole`; the inverse of `gather`.

    Args:
        tokens: (B, L + M, D), text tokens included.
        whole: (B, S, D).
        cells: N, image tokens in `whole`.
        index: (B, M) int64 cells of the tokens; None if none is left out.
        lengths: number of tokens of each sample, if they differ.
        blocks: the adapter's declaration of the block.
    """
    if index is None:
        return tokens
    text, x = split(tokens, index.shape[1], blocks.image)
    return join(text, put_back(x, split(whole, cells, blocks.image)[1], index, lengths), blocks.image)


def select_following(named: Mapping[str, Any], blocks: Blocks, index: Tensor, count: int) -> dict[str, Any]:
    """Do `select_tokens` for all arguments with entries for tokens, and return those arguments by name."""
    found: dict[str, Any] = {}
    for argument in blocks.follow:  # an argument may have two token axes
        if (value := found.get(argument.name, named.get(argument.name))) is not None:
            found[argument.name] = select_tokens(value, argument, blocks, index, count)
    return found


def select_tokens(value: Any, argument: Follow, blocks: Blocks, index: Tensor, count: int) -> Any:
    """Select the entries of some image tokens from an argument with a token axis. Entries of text tokens stay.

    Args:
        value: the argument: a tensor, a tuple, list or mapping of tensors, a `PerSample`, or a number of tokens.
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
        items = range(len(value)) if argument.item is None else (argument.item,)
        inner = replace(argument, item=None)
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


def batch_first(named: Mapping[str, Any], blocks: Blocks, images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Arrange the arguments of a block with samples on the first axis and tokens on the second.

    Args:
        named: arguments as the block takes them, by name.
        blocks: the adapter's declaration of the block.
        images: the grids of the call.

    Returns:
        All arguments, by name.
    """
    if blocks.arrangement is not None:
        return dict(blocks.arrangement.inward(named, images))
    return {**named, **{name: _swapped(named[name]) for name in blocks.sequence_first if name in named}}


def _as_taken(named: Mapping[str, Any], blocks: Blocks, images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Arrange arguments as the block takes them; the inverse of `batch_first`."""
    if blocks.arrangement is not None:
        return dict(blocks.arrangement.outward(named, images))
    return batch_first(named, blocks, images)  # swapping twice changes nothing


def _swapped(value: Any) -> Any:
    """Swap the first two axes of a tensor, or of each tensor in a tuple or list."""
    return type(value)(map(_swapped, value)) if isinstance(value, (tuple, list)) else value.transpose(0, 1)


def as_returned(results: Mapping[str, Any], blocks: Blocks, images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Arrange results of a block, by the names in `blocks.returns`, as the block returns them."""
    out = tuple(results[name] for name in blocks.returns)
    changed = change_results(out, _argument_names(blocks), lambda named: _as_taken(named, blocks, images))
    return dict(zip(blocks.returns, changed, strict=True))


def _argument_names(blocks: Blocks) -> list[str]:
    """Return for each result of a block the name of the argument that it is arranged like."""
    return [{"tokens": blocks.tokens, "text": blocks.text or "text"}.get(name, name) for name in blocks.returns]


def call_by_name(
    call: Callable[..., Any],
    blocks: Blocks,
    positional: Sequence[str],
    keywords: Sequence[str],
    images: Lazy[ImageTokens],
    named: Mapping[str, Any],
) -> Any:
    """Call a block with arguments by name, in the arrangement that it takes.

    Args:
        call: the call of the block.
        blocks: the adapter's declaration of the block.
        positional: names of the arguments to pass by position, as the block's caller did.
        keywords: names of the others.
        images: the grids of the call.
        named: the arguments, batch first.

    Returns:
        Its result, batch first.
    """
    if not blocks.rearranged:
        return call(*(named[name] for name in positional), **{name: named[name] for name in keywords})
    named = _as_taken(named, blocks, images)
    out = call(*(named[name] for name in positional), **{name: named[name] for name in keywords})
    return change_results(out, _argument_names(blocks), lambda named: batch_first(named, blocks, images))


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
            chosen = _in_rounds(rows, batch, len(value)) if several else rows
            length = len(value) if several else batch
            if name in items and isinstance(value, (tuple, list)):
                parts = list(value)
                parts[items[name]] = _rows(parts[items[name]], chosen, length, name in shared)
                selected[id(value)] = type(value)(parts)
            else:
                selected[id(value)] = _rows(value, chosen, length, name in shared)
    return {name: selected[id(value)] for name, value in named.items()}


def _in_rounds(rows: Tensor, batch: int, length: int) -> Tensor:
    """Return where the entries of some samples are among several rounds, and all entries of an incomplete last one."""
    whole = length // batch * batch
    rest = torch.arange(whole, length, device=rows.device)
    return torch.cat([*(rows + start for start in range(0, whole, batch)), rest])


def _rows(value: Any, rows: Tensor, batch: int, shared: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _rows(part, rows, batch, shared) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, batch, shared) for part in value)
    if isinstance(value, PerSample):
        return PerSample.of(value.table.index_select(0, rows))
    if isinstance(value, Tensor) and not shared and value.dim() and value.shape[0] == batch:
        return value.index_select(0, rows.to(value.device))  # sizes of grids may be on the host
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

    def view(self, first: int, *shape: int) -> Tensor:
        """Return a tensor (B, *shape), where code for one table asks for (1, *shape)."""
        assert first == 1, f"a table of one table per sample is viewed as ({first}, ...), which is not supported"
        return self.table.reshape(len(self.table), *shape)

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
