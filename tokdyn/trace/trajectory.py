"""Which step of which guidance branch a call is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trajectory:
    """Places calls in the trajectory that is being sampled.

    Calls at one noise level are branches of one step, by the name that the pipeline gave them or in the order in which
    they come. A noise level above the last one begins a new trajectory, and so does a name that comes again at the
    first level of all: the trajectory before was broken off there.

    Attributes:
        number: trajectories that have begun; memory of another one is worthless.
    """

    number: int = 0
    _first: tuple[float, ...] = ()
    _level: tuple[float, ...] = ()
    _places: int = 0
    _steps: dict[Any, int] = field(default_factory=dict)

    def clear(self) -> None:
        """The next call begins a trajectory."""
        self._begin(())

    def _begin(self, level: tuple[float, ...]) -> None:
        self.number += 1
        self._first, self._level, self._places, self._steps = level, level, 0, {}

    def turn(self, level: tuple[float, ...], branch: str | None) -> Turn:
        """The place of a call at these noise levels of its samples."""
        if level != self._level:
            if len(level) != len(self._level) or level[0] > self._level[0]:
                self._begin(level)
            self._level, self._places = level, 0
        elif level == self._first and branch is not None and branch in self._steps:
            self._begin(level)
        place = self._places if branch is None else branch
        self._places += 1
        self._steps[place] = self._steps.get(place, -1) + 1
        return Turn(self.number, place, self._steps[place], self._places - 1)


@dataclass(frozen=True)
class Turn:
    """The place of a call.

    Attributes:
        trajectory: its number.
        branch: name or place of the guidance branch.
        step: of this branch, from 0.
        place: calls at this noise level before it.
    """

    trajectory: int
    branch: str | int
    step: int
    place: int

    @property
    def unconditional(self) -> bool:
        """Whether this is the unconditional one of two branches in calls of their own."""
        return self.branch == "uncond" or (isinstance(self.branch, int) and self.place > 0)
