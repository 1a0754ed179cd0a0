"""TokenDrop at work: a random subset of the tokens sees a span of blocks, the others skip it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Plan, handles
from tokdyn.attach.view import TokenView
from tokdyn.methods import TokenDrop
from tokdyn.ops.dropping import kept_count, mix, put_back, subset, take


@dataclass
class Dropped:
    """What was dropped in a call.

    Attributes:
        start: (B, N, D) the tokens before the span.
        index: (B, M) places of the tokens that see it, among those.
        lengths: (B) how many they are.
        view: that the bracket opened on.
    """

    start: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    view: TokenView


@dataclass(eq=False)
class DroppedSpan(Bracket):
    """A bracket around the blocks `first` to `last`."""

    method: TokenDrop
    first: int
    last: int
    slot: int

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Keep a random subset of each sample: (B, N, D) to (B, M, D)."""
        context, forced = frame.context, frame.context.settings.drop_rate
        rate = self.method.rate if forced is None else forced
        if not (context.training or forced is not None) or int(x.shape[1] * rate) == 0:
            return x, view
        noise = torch.rand(x.shape[:2], device=x.device) if context.training else self._hash(context, view, x)
        lengths = tuple(kept_count(size, rate) for size in view.sizes)
        index = subset(noise, view.sizes, lengths)
        context.slots[self.slot] = Dropped(x, index, lengths, view)
        cells = index if view.index is None else view.index.gather(1, index)
        return take(x, index), view.reduced(cells, lengths, self.slot)

    def _hash(self, context: CallContext, view: TokenView, x: Tensor) -> Tensor:
        """(B, N) values that depend on noise level and cell alone: sampling is repeatable, in any batch."""
        levels = torch.tensor([round(1e6 * level) for level in context.levels(view)], device=x.device)[:, None]
        cell = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if view.index is None else view.index
        return mix(mix(levels + self.method.seed * 1_000_003) + cell).double()

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Put the others back as they were."""
        state: Dropped | None = frame.context.slots[self.slot]
        if state is None:
            return x, view
        frame.context.slots[self.slot] = None
        return put_back(x, state.start, state.index, state.lengths), state.view


@handles(TokenDrop)
def build(plan: Plan) -> Sequence[object]:
    """Build the bracket around its span."""
    return [DroppedSpan(plan.method, *plan.span, plan.slot)]
