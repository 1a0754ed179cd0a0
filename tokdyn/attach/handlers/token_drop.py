"""The handler of TokenDrop: run a span of blocks on a random subset of the tokens; the others skip it unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import BlockCall, Frame, Plan, Selector, handles
from tokdyn.attach.view import TokenView
from tokdyn.methods import TokenDrop
from tokdyn.methods.drawing import uniform
from tokdyn.ops.dropping import kept_count, mix, put_back, subset, take
from tokdyn.ops.keeping import check_eager, fit_mask


@dataclass
class Dropped:
    """The state between the first and the last block of the span.

    Attributes:
        start: (B, N, D) the tokens before the span.
        index: (B, M) int64 positions, along N, of the tokens that run through the span.
        lengths: number of these tokens of each sample.
        view: the view of `start`.
    """

    start: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    view: TokenView


@dataclass(eq=False)
class DroppedSpan(Selector):
    """Drops tokens before the block `first` and puts them back after the block `last`.

    Acts in training, and in sampling inside of `tokdyn.attach.controls.dropping`.

    Attributes:
        method: the settings.
        slot: slot of the state, a `Dropped` while tokens are left out.
    """

    method: TokenDrop
    first: int
    last: int
    slot: int

    def selects(self, context: CallContext) -> bool:
        """Return whether tokens are dropped: in training, and where a rate for sampling is set."""
        return context.training or context.settings.drop_rate is not None

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Select a random subset of each sample's tokens: (B, N, D) to (B, M, D)."""
        context, sampling_rate = frame.context, frame.context.settings.drop_rate
        rate = self.method.rate if sampling_rate is None else sampling_rate
        if not self.selects(context):
            return x, view
        if int(x.shape[1] * rate) == 0:
            context.trace.fall_short("TokenDrop", (rate,), (0,), (x.shape[1],))
            return x, view
        if context.training:
            noise = uniform(view.samples, x.shape[1], x.device, self.slot)
        else:
            noise = self._hash(context, view, x)
        lengths = tuple(kept_count(size, rate) for size in view.sizes)
        if context.settings.keep is not None:
            check_eager()
            kept = fit_mask(context.settings.keep, context.grid, context.trace.batch)[list(view.samples)]
            least = kept.sum(1).tolist()  # all that may be among the tokens of a sample
            lengths = tuple(max(each[0], min(each[1:])) for each in zip(lengths, view.sizes, least, strict=True))
            dropped = [size - length for size, length in zip(view.sizes, lengths, strict=True)]
            context.trace.fall_short("TokenDrop", [rate] * view.batch, dropped, view.sizes)
            cell, sample = view.rows()
            noise = noise.masked_fill(kept.to(x.device)[sample, cell].view(noise.shape), -1)  # they come first
        index = subset(noise, view.sizes, lengths)
        context.slots[self.slot] = Dropped(x, index, lengths, view)
        cells = index if view.index is None else view.index.gather(1, index)
        return take(x, index), view.reduced(cells, lengths, self.slot)

    def _hash(self, context: CallContext, view: TokenView, x: Tensor) -> Tensor:
        """Hash noise level, seed and cell into (B, N) values, so that sampling is repeatable in a batch of any size."""
        levels = torch.tensor([round(1e6 * level) for level in context.levels(view)], device=x.device)[:, None]
        cell = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if view.index is None else view.index
        return mix(mix(levels + self.method.seed * 1_000_003) + cell).double()

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Put the results among the tokens that skipped the span: (B, M, D) to (B, N, D)."""
        state: Dropped | None = frame.context.slots[self.slot]
        if state is None:
            return x, view
        frame.context.slots[self.slot] = None
        return put_back(x, state.start, state.index, state.lengths), state.view


@handles(TokenDrop)
def build(plan: Plan) -> Sequence[object]:
    """Build the bracket around the method's span of blocks."""
    return [DroppedSpan(plan.method, *plan.span, plan.slot)]
