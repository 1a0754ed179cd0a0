"""Saying so when calibrated methods are used on another model, or with another sampler, than they were made for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from tokdyn.attach.fingerprint import different, other_sampler
from tokdyn.methods import Method
from tokdyn.trace.trajectory import Turn

_CURE = "calibrate again on calls of this one: tokdyn.calibrate(model, calls, {name}())"


def warn_of_another_model(model: nn.Module, methods: Sequence[Method]) -> None:
    """One warning for all methods that were calibrated on a model that is not this one."""
    for method in methods:
        expected = getattr(method, "fingerprint", None)
        reason = different(expected, model) if expected else None
        if reason is not None:
            name = type(method).__name__
            text = f"{name} was calibrated on another model: {reason}. What it decides may be wrong here; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=3)
            return


@dataclass
class SamplerWatch:
    """Compares the steps of the first whole trajectory with those that a method was calibrated on.

    Attributes:
        method: with a fingerprint that names a sampler.
        levels: noise levels of the steps of the trajectory so far.
    """

    method: Method
    levels: list[float] = field(default_factory=list)
    _trajectory: int = -1
    _done: bool = False

    @staticmethod
    def of(methods: Sequence[Method]) -> SamplerWatch | None:
        """A watch for the first method that depends on the sampler; None if there is none."""
        named = (each for each in methods if (getattr(each, "fingerprint", None) or "").count(":") > 2)
        return next((SamplerWatch(each) for each in named), None)

    def see(self, turn: Turn, level: float) -> None:
        """A call of the model in sampling."""
        if turn.trajectory != self._trajectory:
            self.end()
            self._trajectory, self.levels = turn.trajectory, []
        if turn.place == 0:
            self.levels.append(level)

    def end(self) -> None:
        """The trajectory is over: warn, once. A single call is no trajectory."""
        levels, self.levels = self.levels, []
        if self._done or len(levels) < 2:
            return
        self._done = True
        expected: str = self.method.fingerprint  # type: ignore[attr-defined]
        reason = other_sampler(expected, levels)
        if reason is not None:
            name = type(self.method).__name__
            text = f"{name} was calibrated with another sampler: {reason}. What it decides may be wrong here; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=2)
