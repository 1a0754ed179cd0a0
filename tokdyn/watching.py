"""Watch the calls of a wrapped model, and warn once, in words, about methods that were not made for them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from tokdyn.adapters.base import ModelAdapter
from tokdyn.compose import Placed
from tokdyn.errors import InputError
from tokdyn.methods import Method
from tokdyn.presets import published_for
from tokdyn.provenance import different, other_sampler
from tokdyn.trace.comparison import RESEMBLES, SAME, version
from tokdyn.trace.observation import Observation, SampleSeen
from tokdyn.trace.trajectory import Position

_CURE = "calibrate again on calls of this one: tokdyn.calibrate(model, calls, {name}())"


def warn_of_another_model(model: nn.Module, methods: Sequence[Method]) -> None:
    """Warn about the first method that was calibrated on another model than this one, or fitted for another family."""
    for method in methods:
        expected = getattr(method, "fingerprint", None)
        families = frozenset() if expected else published_for(method)
        if families and families.isdisjoint(base.__name__ for base in type(model).__mro__):
            name, kinds = type(method).__name__, " or a ".join(sorted(families))
            text = f"the numbers of {name} were published for a {kinds}, not for a {type(model).__name__}; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=_outside())
            return
        reason = different(expected, model) if expected else None
        if reason is not None:
            name = type(method).__name__
            text = f"{name} was calibrated on another model: {reason}. Its decisions may be wrong here; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=_outside())
            return


def warn_of_missing_gates(model: nn.Module, placed: Sequence[Placed], heads: int) -> None:
    """Warn about a method that decides about heads or groups of channels on a model with a single head.

    Args:
        model: the model.
        placed: the methods with their traits.
        heads: H of the model; 0 if unknown.
    """
    for one in placed:
        if heads == 1 and one.traits.prunes and (one.traits.prunes.heads or one.traits.prunes.channels):
            text = (
                f"this {type(model).__name__} has a single attention head, which is always on, and as many groups of "
                f"channels, so neither have gates: {one.name} selects only tokens of the MLP; write "
                f"{one.name}(heads=False, channels=False) if that is what you want."
            )
            warnings.warn(text, UserWarning, stacklevel=_outside())


def _outside() -> int:
    """Return the stack level of the line outside of tokdyn and torch that led to the caller, to warn there."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("tokdyn", "torch"):
        frame, level = frame.f_back, level + 1
    return level


class FirstCall:
    """Warns at the first call of a model, if that is one in sampling, about methods that do nothing useful there.

    A first call in training shows that the methods are there to be trained.

    Args:
        placed: the methods with their traits.
        parts: their trainable parts, by their index in the user's list.
    """

    def __init__(self, placed: Sequence[Placed], parts: nn.ModuleDict) -> None:
        self._idle: dict[str, str] = {one.name: one.traits.idle for one in placed if one.traits.idle is not None}
        in_training = (one.name for one in placed if one.traits.phases == {"train"})
        self._idle |= dict.fromkeys(in_training, "it acts in training only, so leave it out in sampling")
        self._idle_in = {one.name: one.traits.idle_in for one in placed if one.traits.idle_in is not None}
        self._initial = {
            one.name: (part, [(value, version(value)) for value in part.parameters()])
            for one in placed
            if (part := dict(parts.items()).get(str(one.index))) is not None
        }
        self.settled = not (self._idle or self._idle_in or self._initial)

    def settle(self) -> None:
        """Take the methods for what the user wants, and warn about nothing."""
        self._idle, self._idle_in, self._initial, self.settled = {}, {}, {}, True

    def see(self, model: nn.Module, sampling: bool, steps: int | None = None) -> None:
        """Look at a call before it is made.

        Args:
            model: the model.
            sampling: whether the call is one in sampling.
            steps: number of steps of its trajectory, where that was told.
        """
        if self.settled:
            return
        if steps is not None:
            found = ((name, reason(steps)) for name, reason in self._idle_in.items())
            self._idle |= {name: reason for name, reason in found if reason is not None}
        untrained = [name for name, (part, before) in self._initial.items() if _is_as_before(part, before)]
        reasons = [f"{name} has no effect: {reason}" for name, reason in self._idle.items()]
        if untrained:
            reasons.append(
                f"{' and '.join(untrained)} was never trained, so what it decides means nothing; train it (tokdyn "
                "upcycle), or load trained methods with tokdyn.load"
            )
        self.settle()
        if sampling and reasons:
            text = f"methods on this {type(model).__name__} do nothing useful in sampling. {'. '.join(reasons)}."
            warnings.warn(text, UserWarning, stacklevel=_outside())


class Shortfalls:
    """Warns, once for each method, about calls that leave out fewer tokens, or FLOPs, than its settings ask for.

    Args:
        placed: the methods with their traits.
    """

    def __init__(self, placed: Sequence[Placed]) -> None:
        self._reasons = {one.name: one.traits.short for one in placed}
        self._of_flops = {one.name for one in placed if one.traits.learns == "FLOPs"}

    def settle(self) -> None:
        """Warn about nothing."""
        self._reasons = {}

    def see(self, model: nn.Module, found: Mapping[str, tuple[float, int, int]]) -> None:
        """Look at a call after it was made: its shortfalls as in `CallTrace.shortfalls`."""
        for name, (asked, reached, size) in found.items():
            reason = self._reasons.pop(name, None)
            if reason is not None:
                what, most = ("FLOPs", "at most ") if name in self._of_flops else ("tokens", "")
                text = (
                    f"{name} on this {type(model).__name__} leaves out fewer {what} than its settings ask for: "
                    f"{most}{reached:,} of {size:,} ({reached / size:.1%}) and not {asked:.1%}; {reason}."
                )
                warnings.warn(text, UserWarning, stacklevel=_outside())


class ClockCheck:
    """Holds an assumed direction of time against the first calls in sampling.

    A sampler lowers the noise level from step to step. Where a loop says that a call is of a later step than the call
    before, or its input follows from that one, and its noise level is higher, time runs the other way than assumed.

    Args:
        assumed: whether the direction is assumed.
    """

    def __init__(self, assumed: bool) -> None:
        self.settled = not assumed
        self._before: Observation | None = None

    def see(self, model: nn.Module, seen: Observation) -> None:
        """Look at a call before it is made.

        Raises:
            InputError: time runs the other way than assumed.
        """
        if self.settled:
            return
        last, self._before = self._before, seen
        if last is None:  # the first call may yet show that the model cannot be wrapped
            return
        now, before = seen.samples, last.samples
        if len(now) != len(before) or not (_is_next_step(seen, last) or _follows(now)):
            return
        rises = [each.level > was.level for each, was in zip(now, before, strict=True)]
        falls = [each.level < was.level for each, was in zip(now, before, strict=True)]
        if falls and all(falls):
            self.settled, self._before = True, None
        if rises and all(rises):
            raise InputError(
                f"the noise level of this {type(model).__name__} seems to rise from step to step, from "
                f"{before[0].level:.3g} to {now[0].level:.3g}, so its time may run the other way than assumed; say "
                "what its time is at pure noise and at the image, as in tokdyn.wrap(model, methods, level=(1.0, 0.0))."
            )


def _is_next_step(seen: Observation, last: Observation) -> bool:
    """Return whether a loop said that a call is of a later step than the call before; the first step may be untold."""
    return seen.step is not None and (seen.step == 1 if last.step is None else seen.step > last.step)


def _follows(now: Sequence[SampleSeen]) -> bool:
    """Return whether the inputs of a call seem to follow from those of the call before."""
    return all(RESEMBLES <= each.alike < SAME for each in now)


def _is_as_before(part: nn.Module, before: Sequence[tuple[Tensor, int | None]]) -> bool:
    """Return whether the parameters of a part are the same tensors as before, and nothing was written to them."""
    now = list(part.parameters())
    return len(now) == len(before) and all(
        value is one and version(value) == written for value, (one, written) in zip(now, before, strict=True)
    )


@dataclass
class SamplerCheck:
    """Warns, once, if a complete trajectory has another sampler than the one that a method was calibrated with.

    Attributes:
        method: the method, whose fingerprint includes a sampler.
        levels: noise levels of the steps of the current trajectory so far.
    """

    method: Method
    levels: list[float] = field(default_factory=list)
    _trajectory: int = -1
    _done: bool = False

    @staticmethod
    def of(methods: Sequence[Method]) -> SamplerCheck | None:
        """Return a check for the first method whose fingerprint includes a sampler; None if there is no such method."""
        with_sampler = (method for method in methods if (getattr(method, "fingerprint", None) or "").count(":") > 2)
        return next((SamplerCheck(method) for method in with_sampler), None)

    def see(self, position: Position, level: float) -> None:
        """Add a call of the model in sampling, at this noise level; a new trajectory ends the one before."""
        if position.trajectory != self._trajectory:
            self.end()
            self._trajectory, self.levels = position.trajectory, []
        if position.place == 0:
            self.levels.append(level)

    def end(self) -> None:
        """End the trajectory, and compare its sampler unless one has differed. A single call is not compared."""
        levels, self.levels = self.levels, []
        if self._done or len(levels) < 2:
            return
        expected: str = self.method.fingerprint  # type: ignore[attr-defined]
        reason = other_sampler(expected, levels)
        if reason is not None:
            self._done = True
            name = type(self.method).__name__
            text = f"{name} was calibrated with another sampler: {reason}. Its decisions may be wrong here; "
            warnings.warn(text + _CURE.format(name=name) + ".", UserWarning, stacklevel=2)


@dataclass
class Watch:
    """What is watched to warn about once.

    Attributes:
        first: the first call.
        clock: the direction of time.
        sampler: the sampler; None if no method was calibrated with one.
        shortfalls: tokens left out.
        done: whether no further call has to be looked at before it is made.
    """

    first: FirstCall
    clock: ClockCheck
    sampler: SamplerCheck | None
    shortfalls: Shortfalls
    done: bool = False

    @staticmethod
    def over(adapter: ModelAdapter, placed: Sequence[Placed], parts: nn.ModuleDict) -> Watch:
        """Watch over methods, given with their traits, and their trainable parts, by index in the user's list."""
        sampler = SamplerCheck.of([one.method for one in placed])
        return Watch(FirstCall(placed, parts), ClockCheck(adapter.clock == "assumed"), sampler, Shortfalls(placed))

    @staticmethod
    def over_nothing() -> Watch:
        """Watch over calls that are none of the user's."""
        return Watch(FirstCall((), nn.ModuleDict()), ClockCheck(assumed=False), None, Shortfalls(()))

    def settle(self) -> None:
        """Take the methods for what the user wants."""
        self.first.settle()
        self.shortfalls.settle()

    def see(self, model: nn.Module, seen: Observation | None, sampling: bool, steps: int | None = None) -> None:
        """Look at a call before it is made; `steps` is the number of steps of its trajectory, where that was told.

        Raises:
            InputError: time runs the other way than assumed.
        """
        self.first.see(model, sampling, steps)
        if seen is not None:
            self.clock.see(model, seen)
        self.done = self.first.settled and self.clock.settled
