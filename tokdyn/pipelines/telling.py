"""Tell the denoisers of a pipeline the trajectory that its calls belong to, from its scheduler.

While a pipeline is called, the class of its scheduler is swapped for a subclass whose `step` counts and whose
`set_timesteps` begins a trajectory. Every entry of the timesteps is a step, so that a sampler of second order has two
for each of its own. Until the scheduler has made its first step nothing is told, because some pipelines step by
themselves; the calls until then are those of one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokdyn.attach import Attachment

_STEPS = "_num_timesteps"  # where diffusers' pipelines keep the number of timesteps of their loop


class Teller:
    """Tells the steps of one call of a pipeline.

    Args:
        pipe: the pipeline.
        attachments: those of its denoisers.
    """

    def __init__(self, pipe: Any, attachments: Sequence[Attachment]) -> None:
        self._pipe, self._attachments = pipe, attachments
        self._scheduler = pipe.components.get("scheduler")
        self._made = 0

    def begin(self) -> None:
        """Begin a trajectory in every denoiser."""
        self._made = 0
        for attachment in self._attachments:
            attachment.end()

    def stepped(self) -> None:
        """Go on to the next step, or end the trajectory after its last one."""
        self._made += 1
        steps = self._number_of_steps()
        if steps is not None and self._made >= steps:
            self.begin()
            return
        for attachment in self._attachments:
            attachment.trajectory.step, attachment.trajectory.steps = self._made, steps

    def _number_of_steps(self) -> int | None:
        """Return how many steps the loop has: what the pipeline says, or what is left to the scheduler at its start."""
        told = getattr(self._pipe, _STEPS, None)
        if told is None:
            timesteps = getattr(self._scheduler, "timesteps", None)
            told = None if timesteps is None else len(timesteps) - (getattr(self._scheduler, "begin_index", None) or 0)
        return told if told is None or told >= self._made else None


class _Alike(type):
    """The class of a class that equals its base: a pipeline of diffusers compares the class of its scheduler (Bria)."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


@contextmanager
def listening(scheduler: Any, teller: Teller) -> Iterator[None]:
    """Let a scheduler report to a teller while the context is open. Copies of it, made meanwhile, do not report."""
    if scheduler is None:
        yield
        return
    base = type(scheduler)

    def reporting(name: str, report: Callable[[], None]) -> Callable[..., Any]:
        original = getattr(base, name)

        @functools.wraps(original)  # pipelines ask which arguments it takes
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = original(self, *args, **kwargs)
            if self is scheduler:
                report()
            return out

        return method

    reports = {"step": teller.stepped, "set_timesteps": teller.begin}
    names = {name: reporting(name, report) for name, report in reports.items() if hasattr(base, name)}
    about = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    kind: Any = _Alike if type(base) is type else type(base)
    scheduler.__class__ = kind(base.__name__, (base,), {**about, **names})
    try:
        yield
    finally:
        scheduler.__class__ = base
