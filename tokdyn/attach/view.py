"""Which samples and which tokens a block call is about, and how tensors are brought to them and back.

A `TokenView` is frozen and passed as an argument. Dense tokens (B, S, D), with text beside them or not, and packed
tokens (T, D) answer the same questions, so that the engine has one path for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.base import Blocks
from tokdyn.adapters.tokens import follow, join, of_samples, split
from tokdyn.ops.pack import pack_index, packing_of
from tokdyn.tokens import Packing

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class TokenView:
    """Samples and tokens of a block call.

    Attributes:
        samples: places in the batch of the model's call, one for each sample of the view.
        cells: N, cells of the full grid of each sample.
        device: where the tokens are.
        room: M, image tokens of a sample that there is room for; N while all are there.
        index: (B, M) cells whose tokens are there, rising; None while all are there, and for packed tokens.
        lengths: (B) tokens of each sample that count where they differ; the slots behind them hold nothing.
        packing: where packed rows lie; None for dense tokens.
        idle: places within the view of samples whose tokens pass through the blocks unchanged.
        source: slots of the brackets that chose the tokens, outermost first.
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

    @property
    def batch(self) -> int:
        """Samples of the view."""
        return len(self.samples)

    @property
    def all_idle(self) -> bool:
        """Whether no sample is computed."""
        return len(self.idle) == len(self.samples)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Image tokens of each sample."""
        return (self.packing.lengths if self.packing is not None else self.lengths) or (self.room,) * self.batch

    def reduced(self, index: Tensor, sizes: Sequence[int], slot: int) -> TokenView:
        """Make the view of fewer tokens that a bracket chose.

        Args:
            index: (B, M) cells of the grid.
            sizes: tokens of each sample, at most M.
            slot: of the bracket.
        """
        lengths = tuple(sizes) if len(set(sizes)) > 1 else None
        return replace(self, room=index.shape[1], index=index, lengths=lengths, source=(*self.source, slot))

    def split(self, x: Tensor, blocks: Blocks) -> tuple[Tensor | None, Tensor]:
        """Split what a block gets or returns into text tokens, None where there are none, and image tokens."""
        return split(x, self.room, blocks.image)

    def rows(self) -> tuple[Tensor, Tensor]:
        """List the cell and the sample of every image token, (T,) int64 each."""
        if self.packing is not None:
            return self.packing.cell, self.packing.sample
        index = self.index
        if index is None:
            index = torch.arange(self.room, device=self.device).expand(self.batch, -1)
        return index.reshape(-1), torch.arange(self.batch, device=self.device).repeat_interleave(index.shape[1])

    def take(self, places: Sequence[int]) -> Part:
        """Take some of the samples, which must be of one length in a dense view.

        Args:
            places: of the samples within this view.
        """
        chosen, samples = torch.tensor(places, device=self.device), tuple(self.samples[place] for place in places)
        if self.packing is not None:
            rows = torch.isin(self.packing.sample, chosen).nonzero().squeeze(1)
            packing = _some(self.packing, places, rows)
            view = replace(self, samples=samples, room=packing.longest, packing=packing, idle=frozenset())
            return Part(view, self, chosen, rows)
        length = self.sizes[places[0]]
        index = None if self.index is None else self.index.index_select(0, chosen)[:, :length]
        view = replace(self, samples=samples, room=length, index=index, lengths=None, idle=frozenset())
        return Part(view, self, chosen, chosen)

    def padded(self, rows: Tensor) -> tuple[Tensor, TokenView]:
        """Turn packed rows (T, D) into (B, M, D), each sample's tokens first, for brackets; dense tokens stay."""
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
        """Turn (B, M, D) into packed rows (T, D), the opposite of `padded`; `before` is the packing it came from."""
        assert self.index is not None
        packing = before if self.sizes == before.lengths else pack_index(self.index, self.sizes, before.grid)
        slot = torch.arange(x.shape[1], device=x.device)
        filled = (slot < torch.tensor(self.sizes, device=x.device)[:, None]).flatten()
        rows = torch.nonzero_static(filled, size=sum(self.sizes)).squeeze(1)
        view = replace(self, index=None, lengths=None, packing=packing, room=packing.longest)
        return x.reshape(-1, x.shape[-1]).index_select(0, rows), view


@dataclass(frozen=True)
class Part:
    """Some samples of a view, computed apart from the others.

    Attributes:
        view: of these samples alone.
        whole: the view that they are taken from.
        places: (b,) int64, their places in it.
        rows: (b,) or (t,) int64, what is selected of dense or of packed tokens.
    """

    view: TokenView
    whole: TokenView
    places: Tensor
    rows: Tensor

    def take(self, named: Mapping[str, Any], blocks: Blocks) -> dict[str, Any]:
        """Select the entries of these samples and their tokens; arguments without a batch are shared by all.

        Arguments that follow the tokens are left to `FollowedArguments`.

        Args:
            named: arguments of a block or a sublayer, by name.
            blocks: says what they are.
        """
        batch = self.whole.batch
        if self.view.packing is None:
            following = {how.name for how in blocks.follow}
            rest = {name: value for name, value in named.items() if name not in following}
            chosen = {**named, **of_samples(rest, self.places, batch, blocks)}
            if blocks.tokens in chosen:
                chosen[blocks.tokens] = self._shortened(chosen[blocks.tokens], blocks)
            return chosen
        assert blocks.packing is not None
        rest = {name: value for name, value in named.items() if name not in (blocks.tokens, blocks.packing)}
        rows = {blocks.tokens: named[blocks.tokens].index_select(0, self.rows), blocks.packing: self.view.packing}
        return {**named, **of_samples(rest, self.places, batch, blocks), **rows}

    def scatter(self, name: str, whole: Any, part: Any, blocks: Blocks) -> Any:
        """Put the results of these samples in the place of what was there.

        Args:
            name: "tokens" or "text".
            whole: of all samples, or None.
            part: of these; None wins.
            blocks: says where image tokens lie.
        """
        if whole is None or part is None:
            return part
        length, room = self.view.room, self.whole.room
        if name == "tokens" and self.view.packing is None and length < room:
            text, x = split(part, length, blocks.image)
            behind = split(whole.index_select(0, self.rows), room, blocks.image)[1][:, length:]
            part = join(text, torch.cat([x, behind.to(x.dtype)], dim=1), blocks.image)
        return whole.index_copy(0, self.rows if name == "tokens" else self.places, part.to(whole.dtype))

    def _shortened(self, x: Tensor, blocks: Blocks) -> Tensor:
        """Leave out the slots that hold nothing."""
        length, room = self.view.room, self.whole.room
        if length == room:
            return x
        text, own = split(x, room, blocks.image)
        return join(text, own[:, :length], blocks.image)


def _some(packing: Packing, places: Sequence[int], rows: Tensor) -> Packing:
    """Make the packing of some of the samples."""
    lengths = tuple(packing.lengths[place] for place in places)
    cell = packing.cell.index_select(0, rows)
    sample = torch.repeat_interleave(torch.tensor(lengths, device=cell.device), output_size=len(cell))
    return packing_of(lengths, sample, cell, packing.grid)


class FollowedArguments:
    """Arguments brought to the tokens of a view, kept while block after block asks for the same."""

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[Any, Tensor | None, Any]] = {}

    def select(self, named: Mapping[str, Any], blocks: Blocks, view: TokenView, part: Part | None) -> dict[str, Any]:
        """Give the arguments that follow the tokens entries for the tokens of a view alone.

        Args:
            named: arguments of a block by name, of all samples.
            blocks: says which of them follow the tokens.
            view: the tokens.
            part: how its samples are taken from another view; None if it has all of them.

        Returns:
            Those that change, by name.
        """
        selected: dict[str, Any] = {}
        for how in blocks.follow if part is not None or view.index is not None else ():
            value = selected.get(how.name, named.get(how.name))  # an argument may follow along two axes
            if value is None:
                continue
            key = (how.name, how.axis, view.samples, view.room, view.source)
            index = (part.whole if part else view).index
            kept = self._kept.get(key)
            if kept is None or kept[0] is not value or kept[1] is not index:
                fitting = value
                if part is not None and how.name not in selected:
                    fitting = of_samples({how.name: value}, part.places, part.whole.batch, blocks)[how.name]
                if view.index is not None:
                    fitting = follow(fitting, how, blocks, view.index, view.cells)
                kept = self._kept[key] = value, index, fitting
            selected[how.name] = kept[2]
        return selected
