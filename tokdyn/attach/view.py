"""Describe which samples and tokens a block call is about, and select and restore their entries in tensors.

A `TokenView` is frozen and passed as an argument. It has the same interface for dense tokens (B, S, D), with or without
text tokens in the same sequence, and for packed tokens (T, D), so that the engine has one path for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.base import Blocks
from tokdyn.adapters.tokens import join, rotate_entries, select_samples, select_tokens, split, together
from tokdyn.ops.pack import pack_index, packing_of_some
from tokdyn.tokens import Grid, Packing

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TokenView:
    """The samples and image tokens of a block call, those of reference images included.

    Attributes:
        samples: for each sample of the view, its position in the batch of the model's call.
        cells: N, image tokens of one sample while none is left out. Cells of references are counted with the others.
        room: M, the image tokens that one sample has room for in a dense tensor (B, M, D), or the most that a sample
            has in packed tokens. It is N while no token is left out.
        device: device of the tokens.
        index: (B, M) int64 cells of the tokens, ascending; None while no token is left out, and for packed tokens.
        lengths: number of tokens of each sample, B in all, if they differ; the entries of `index` and of tensors behind
            them are padding. None if every sample has M, and for packed tokens.
        packing: which cells and samples packed rows belong to; None for dense tokens.
        idle: positions within the view of the samples that skip all blocks until the bracket that said so closes.
        source: slots of the brackets that selected the tokens, outermost first.
        grid: the grid of the cells, if samples are split into parts; each part is a sample then, and `samples` repeats.
    """

    samples: tuple[int, ...]
    cells: int
    room: int
    device: torch.device = _CPU
    index: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    packing: Packing | None = None
    idle: frozenset[int] = frozenset()
    source: tuple[int, ...] = ()
    grid: Grid | None = None

    @property
    def batch(self) -> int:
        """Number of samples in the view."""
        return len(self.samples)

    @property
    def all_idle(self) -> bool:
        """Whether all samples are idle."""
        return len(self.idle) == len(self.samples)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of image tokens of each sample, without padding."""
        return (self.packing.lengths if self.packing is not None else self.lengths) or (self.room,) * self.batch

    def with_idle(self, idle: frozenset[int]) -> TokenView:
        """Return the view with other idle samples. It runs in every cached step, where `replace` would be felt."""
        return TokenView(
            self.samples, self.cells, self.room, self.device, self.index, self.lengths, self.packing, idle, self.source
        )

    def reduced(self, index: Tensor, sizes: Sequence[int], slot: int) -> TokenView:
        """Return the view of the tokens that a bracket selected from this one.

        Args:
            index: (B, M) int64 cells of the selected tokens, ascending.
            sizes: number of selected tokens of each sample, at most M.
            slot: the slot of the bracket.
        """
        lengths = tuple(sizes) if len(set(sizes)) > 1 else None
        return replace(self, room=index.shape[1], index=index, lengths=lengths, source=(*self.source, slot))

    def generated(self, beside: tuple[int, int]) -> TokenView:
        """Return the view of the generated tokens alone; `beside` are the reference tokens before and after them."""
        first, count = beside[0], sum(beside)
        if not count:
            return self
        room, lengths = self.room - count, self.lengths
        return replace(
            self,
            cells=self.cells - count,
            room=room,
            index=None if self.index is None else self.index[:, first : first + room] - first,
            lengths=None if lengths is None else tuple(length - count for length in lengths),
        )

    def among(self, beside: tuple[int, int]) -> TokenView:
        """Return the view of the generated tokens among the references before and after them; undoes `generated`."""
        first, last = beside
        count, lengths, index = first + last, self.lengths, self.index
        if not count:
            return self
        if index is not None:
            places = torch.arange(self.cells + count, device=index.device).expand(self.batch, -1)
            index = together(places[:, :first], index + first, places[:, first + self.cells :], lengths)
        return replace(
            self,
            cells=self.cells + count,
            room=self.room + count,
            index=index,
            lengths=None if lengths is None else tuple(length + count for length in lengths),
        )

    def split(self, x: Tensor, blocks: Blocks) -> tuple[Tensor | None, Tensor]:
        """Split x (B, S, D), tokens of this view that a block gets or returns, into text and image tokens.

        Returns:
            Text tokens (B, L, D), None if the sequence has none, and image tokens (B, M, D).
        """
        return split(x, self.room, blocks.image)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the cell and the sample (its position in the view) of every image token, (T,) int64 each."""
        if self.packing is not None:
            return self.packing.cell, self.packing.sample
        index = self.index
        if index is None:
            index = torch.arange(self.room, device=self.device).expand(self.batch, -1)
        return index.reshape(-1), torch.arange(self.batch, device=self.device).repeat_interleave(index.shape[1])

    def take(self, places: Sequence[int]) -> Part:
        """Select some samples of the view. In a dense view they must all have the same number of tokens.

        Args:
            places: positions of the samples within this view.
        """
        chosen, samples = torch.tensor(places, device=self.device), tuple(self.samples[place] for place in places)
        if self.packing is not None:
            rows = torch.isin(self.packing.sample, chosen).nonzero().squeeze(1)
            packing = packing_of_some(self.packing, places, rows)
            view = replace(self, samples=samples, room=packing.longest, packing=packing, idle=frozenset())
            return Part(view, self, chosen, rows)
        length = self.sizes[places[0]]
        index = None if self.index is None else self.index.index_select(0, chosen)[:, :length]
        view = replace(self, samples=samples, room=length, index=index, lengths=None, idle=frozenset())
        return Part(view, self, chosen, chosen)

    def padded(self, rows: Tensor) -> tuple[Tensor, TokenView]:
        """Turn packed rows (T, D) into dense tokens (B, M, D), because brackets work on those; return their view too.

        Each sample's tokens come first; copies of its last token fill the rest. Dense tokens stay as they are.
        """
        if self.packing is None:
            return rows, self
        packing = self.packing
        slot = torch.arange(packing.longest, device=rows.device)
        last = torch.tensor(packing.lengths, device=rows.device)[:, None] - 1
        place = (packing.cu_seqlens[:-1].long()[:, None] + torch.minimum(slot, last)).flatten()
        index = packing.cell.index_select(0, place).view(self.batch, -1)
        lengths = packing.lengths if len(set(packing.lengths)) > 1 else None
        view = replace(self, index=index, lengths=lengths, packing=None)
        return rows.index_select(0, place).view(self.batch, packing.longest, -1), view

    def packed(self, x: Tensor, before: Packing) -> tuple[Tensor, TokenView]:
        """Turn dense tokens (B, M, D) of this view into packed rows (T, D); the inverse of `padded`.

        Args:
            x: the tokens.
            before: the packing that `padded` got, reused if the number of tokens of each sample is the same.

        Returns:
            The packed rows and their view.
        """
        assert self.index is not None
        packing = before if self.sizes == before.lengths else pack_index(self.index, self.sizes, before.grid)
        slot = torch.arange(x.shape[1], device=x.device)
        filled = (slot < torch.tensor(self.sizes, device=x.device)[:, None]).flatten()
        rows = torch.nonzero_static(filled, size=sum(self.sizes)).squeeze(1)
        view = replace(self, index=None, lengths=None, packing=packing, room=packing.longest)
        return x.reshape(-1, x.shape[-1]).index_select(0, rows), view


@dataclass(frozen=True)
class Part:
    """Some samples of a view, which are computed separately from the others.

    Attributes:
        view: the view of these samples alone.
        whole: the view that they are selected from.
        places: (b,) int64 positions of these samples in `whole`.
        rows: int64 indices along axis 0 of a tensor of tokens: `places` for dense tokens, the (t,) rows of these
            samples for packed tokens.
    """

    view: TokenView
    whole: TokenView
    places: Tensor
    rows: Tensor

    def take(self, named: Mapping[str, Any], blocks: Blocks) -> dict[str, Any]:
        """Select the entries of these samples, without padding, from the arguments of a block.

        Arguments without a batch axis stay as they are, and so do those in `blocks.follow` if the tokens are dense:
        `FollowedArguments` selects from these.

        Args:
            named: the arguments for all samples, by name.
            blocks: the adapter's declaration of the block.

        Returns:
            All arguments, by name.
        """
        batch = self.whole.batch
        if self.view.packing is None:
            following = {argument.name for argument in blocks.follow}
            rest = {name: value for name, value in named.items() if name not in following}
            selected = {**named, **select_samples(rest, self.places, batch, blocks)}
            if blocks.tokens in selected:
                selected[blocks.tokens] = self._unpadded(selected[blocks.tokens], blocks)
            return selected
        assert blocks.packing is not None
        rest = {name: value for name, value in named.items() if name not in (blocks.tokens, blocks.packing)}
        rows = {blocks.tokens: named[blocks.tokens].index_select(0, self.rows), blocks.packing: self.view.packing}
        return {**named, **select_samples(rest, self.places, batch, blocks), **rows}

    def scatter(self, name: str, whole: Any, part: Any, blocks: Blocks) -> Any:
        """Write the results of these samples into a tensor for all samples.

        Args:
            name: "tokens" or "text", which of the block's results this is.
            whole: the tensor for all samples, which is not changed; may be None.
            part: the results of these samples; may be None.
            blocks: the adapter's declaration of the block.

        Returns:
            A copy of `whole` with the entries of these samples replaced; `part` itself if either of them is None.
        """
        if whole is None or part is None:
            return part
        length, room = self.view.room, self.whole.room
        if name == "tokens" and self.view.packing is None and length < room:
            text, x = split(part, length, blocks.image)
            behind = split(whole.index_select(0, self.rows), room, blocks.image)[1][:, length:]
            part = join(text, torch.cat([x, behind.to(x.dtype)], dim=1), blocks.image)
        return whole.index_copy(0, self.rows if name == "tokens" else self.places, part.to(whole.dtype))

    def _unpadded(self, x: Tensor, blocks: Blocks) -> Tensor:
        """Leave out the padding of x (b, S, D): all image tokens behind the number that these samples have."""
        length, room = self.view.room, self.whole.room
        if length == room:
            return x
        text, own = split(x, room, blocks.image)
        return join(text, own[:, :length], blocks.image)


class FollowedArguments:
    """Selects from the arguments in `Blocks.follow`, and remembers the results, since most blocks get the same ones."""

    def __init__(self) -> None:
        self._selected: dict[Any, tuple[Any, Tensor | None, Any]] = {}

    def select(
        self, named: Mapping[str, Any], blocks: Blocks, view: TokenView, part: Part | None, rotation: Sequence[int]
    ) -> dict[str, Any]:
        """Select the entries of a view's tokens from the arguments that have one entry per token.

        Args:
            named: the arguments of a block for all samples and cells, by name.
            blocks: the adapter's declaration of the block.
            view: the samples and tokens to select.
            part: the part that `view` belongs to; None if `view` has all samples of the arguments.
            rotation: by how many places the sequence of each sample of the arguments is rotated first; () by none.

        Returns:
            The arguments that change, by name.
        """
        selected: dict[str, Any] = {}
        length = named[blocks.tokens].shape[1] - (part.whole if part else view).room + view.cells if rotation else 0
        for argument in blocks.follow if part is not None or view.index is not None or rotation else ():
            name = argument.name
            value = selected.get(name, named.get(name))  # an argument may have two token axes
            if value is None:
                continue
            key = (argument, view.samples, view.room, view.source)
            index = (part.whole if part else view).index
            known = self._selected.get(key)
            if known is None or known[0] is not value or known[1] is not index:
                rotates = rotation and name not in selected
                entries = rotate_entries(value, argument, rotation, length) if rotates else value
                if part is not None and name not in selected:
                    entries = select_samples({name: entries}, part.places, part.whole.batch, blocks)[name]
                if view.index is not None:
                    entries = select_tokens(entries, argument, blocks, view.index, view.cells)
                known = self._selected[key] = value, index, entries
            selected[name] = known[2]
        return selected
