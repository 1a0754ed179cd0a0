"""Observe what a feature cache sees in a model, without reusing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokdyn.adapters.clock import Level
from tokdyn.attach import BlockCall, CachedBlocks, Frame, TokenView, attached, unwrap, wrap
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.trace.trajectory import Position


def _no_flops() -> int:
    return 0


@dataclass(eq=False)
class Observer(CachedBlocks):
    """A cache that keeps the indicator and the output of the blocks instead of comparing them.

    Attributes:
        spent: returns the FLOPs spent so far in this call.
        inside: FLOPs between opening and closing the cache.
        indicator_flops: FLOPs of the indicator.
    """

    spent: Callable[[], int] = _no_flops
    inside: int = 0
    indicator_flops: int = 0
    _seen: list[Any] = field(default_factory=list)

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Compute the indicator."""
        before = self.spent()
        indicator = self.indicator(frame.context, view, x, block)
        self.indicator_flops = self.spent() - before
        self._seen = [frame.context.position, frame.context.levels(view), indicator, x]
        self.inside = self.spent()
        return x, view

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Keep the output."""
        self.inside = self.spent() - self.inside
        self._seen.append(x)
        return x, view

    def take(self) -> tuple[Position, tuple[float, ...], Tensor, Tensor, Tensor]:
        """Return and forget the step, noise levels, indicator, and image tokens before and after the blocks.

        All are those of the last call.

        Raises:
            InputError: the first or the last block did not run.
        """
        seen, self._seen = self._seen, []
        if len(seen) != 5:
            raise InputError(
                "the first or the last block did not run in a recorded call, but a cache needs both; record calls of "
                "the whole model."
            )
        position, levels, indicator, start, output = seen
        return position, levels, indicator, start, output


@contextmanager
def observing(model: nn.Module, method: FeatureCache, level: Level | None = None) -> Iterator[Observer]:
    """Wrap a model with a cache and replace the cache by an observer within this context; `level` is that of `wrap`.

    Raises:
        CompositionError: the model does not support the indicator.
    """
    observed = FeatureCache(threshold=1.0, indicator=method.indicator)
    attachment = attached(wrap(model, [observed], level))
    try:
        observers: list[Observer] = []

        def replaced(handler: Any) -> Any:
            if not isinstance(handler, CachedBlocks):
                return handler
            observers.append(Observer(observed, handler.first, handler.last, handler.slot))
            return observers[-1]

        attachment.replace_handlers(replaced)
        yield observers[0]
    finally:
        unwrap(model)
