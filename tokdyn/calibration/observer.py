"""Looking at a model through the eyes of a feature cache that never reuses anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokdyn.attach import BlockCall, CachedBlocks, Frame, TokenView, attached, unwrap, wrap
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.trace.trajectory import Position


def _nothing() -> int:
    return 0


@dataclass(eq=False)
class Observer(CachedBlocks):
    """A cache in its place, which keeps what it sees.

    Attributes:
        spent: says how many FLOPs were spent so far in this call.
        inside: FLOPs between opening and closing.
        looking: FLOPs of the indicator.
    """

    spent: Callable[[], int] = _nothing
    inside: int = 0
    looking: int = 0
    _seen: list[Any] = field(default_factory=list)

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """See the indicator."""
        before = self.spent()
        indicator = self.indicator(frame.context, x, block)
        self.looking = self.spent() - before
        self._seen = [frame.context.position, frame.context.levels(view), indicator]
        self.inside = self.spent()
        return x, view

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """See the output."""
        self.inside = self.spent() - self.inside
        self._seen.append(x)
        return x, view

    def seen(self) -> tuple[Position, tuple[float, ...], Tensor, Tensor]:
        """Position, levels, indicator and image tokens behind the last block of the last call, once.

        Raises:
            InputError: the first or the last block did not run.
        """
        found, self._seen = self._seen, []
        if len(found) != 4:
            raise InputError(
                "the first or the last block did not run in a recorded call, and a cache needs both; record calls of "
                "the whole model."
            )
        position, levels, indicator, output = found
        return position, levels, indicator, output


@contextmanager
def observing(model: nn.Module, method: FeatureCache) -> Iterator[Observer]:
    """Within this context an observer is where the cache would be.

    Raises:
        CompositionError: the model and the indicator do not go together.
    """
    watched = FeatureCache(threshold=1.0, indicator=method.indicator)
    attachment = attached(wrap(model, [watched]))
    try:
        found: list[Observer] = []

        def put(handler: Any) -> Any:
            if isinstance(handler, CachedBlocks):
                found.append(Observer(watched, handler.first, handler.last, handler.slot))
                return found[-1]
            return handler

        attachment.replace_handlers(put)
        yield found[0]
    finally:
        unwrap(model)
