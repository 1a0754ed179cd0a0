"""Looking at a model through the eyes of a feature cache that never reuses anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tokdyn.attach.entry import attached, unwrap, wrap
from tokdyn.attach.handlers.feature_cache import Cache
from tokdyn.attach.run import Run
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.trace.trajectory import Turn


def _nothing() -> int:
    return 0


@dataclass
class Observer(Cache):
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

    def open(self, run: Run, x: Tensor) -> Tensor:
        """See the indicator."""
        before = self.spent()
        indicator = self._indicator(run, x)
        self.looking = self.spent() - before
        self._seen = [run.turn, run.level, indicator]
        self.inside = self.spent()
        return x

    def close(self, run: Run, x: Tensor) -> Tensor:
        """See the output."""
        self.inside = self.spent() - self.inside
        self._seen.append(x)
        return x

    def seen(self) -> tuple[Turn, tuple[float, ...], Tensor, Tensor]:
        """Turn, levels, indicator and image tokens behind the last block of the last call, once.

        Raises:
            InputError: the first or the last block did not run.
        """
        found, self._seen = self._seen, []
        if len(found) != 4:
            raise InputError(
                "the first or the last block did not run in a recorded call, and a cache needs both; record calls of "
                "the whole model."
            )
        turn, levels, indicator, output = found
        return turn, levels, indicator, output


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

        def put(bracket: Any) -> Any:
            if not isinstance(bracket, Cache):
                return bracket
            found.append(Observer(watched, bracket.first, bracket.last))
            return found[-1]

        attachment.caches = tuple(put(each) for each in attachment.caches)
        attachment.actors = replace(attachment.actors, brackets=tuple(put(each) for each in attachment.actors.brackets))
        yield found[0]
    finally:
        unwrap(model)
