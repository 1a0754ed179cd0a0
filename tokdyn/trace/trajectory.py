"""Which step of which guidance branch of which image each call is.

A pipeline that knows says so (`Trajectory.begin`, `Trajectory.end`, names of branches). Of a bare model it is guessed
from what the calls look like, sample by sample, and in doubt a call begins a new image, so that nothing is taken over.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokdyn.trace.observation import SAME, UNKNOWN, Observation, as_input, compare, conditioning, main_input

RESEMBLES = 0.4
"""Correlation from which on an input is taken for the latents that follow those of the call before.

Steps of ODE samplers of first order lie at 1, of DDPM in 25 steps above 0.65; independent noise lies around 0.1.
"""
ROUNDED = 0.01
"""Share by which latents may move between steps whose noise levels round to one number (bf16 has 8 bits).

More at one noise level is another branch of the step, with latents of its own.
"""
MOST_BRANCHES = 4  # calls on one input that can be branches of guidance; more are a loop over one call
_REMEMBERED = 8  # branches whose steps are counted
_PREDICTIONS = 2  # calls of a step whose predictions are kept to explain the next latents


@dataclass(frozen=True)
class Position:
    """The place of a call.

    Attributes:
        branch: tells the guidance branch from others: its name, or a key made of what it is conditioned on.
        place: calls of the same step before it.
        images: (B) for each sample what tells its image and its conditioning from others; something that was remembered
            for a sample holds only while this is equal.
        steps: (B) step of each sample within its image, counted for this branch.
        run: number of the trajectory, counted over those that began for all samples at once.
        same_input: whether all calls of the step so far had one input.
    """

    branch: Hashable
    place: int
    images: tuple[Hashable, ...]
    steps: tuple[int, ...]
    run: int
    same_input: bool = True

    @property
    def label(self) -> str | int:
        """Name of the branch, or its place among the calls of a step, for people to read."""
        return self.branch if isinstance(self.branch, str) else self.place

    @property
    def unconditional(self) -> bool:
        """Whether this is the unconditional one of two branches in calls of their own, which have one input."""
        return self.branch == "uncond" or (not isinstance(self.branch, str) and self.place > 0 and self.same_input)


@dataclass
class Tracker:
    """Turns observations into positions, one after the other; replayed on recorded observations it says the same.

    Calls at equal noise levels are branches of one step, unless their latents moved so little that the levels of two
    steps were rounded to one. A sample begins a new image where its noise
    level rises, its input does not resemble the one before, or the batch has another size.
    """

    run: int = 0
    _image: int = 0
    _images: list[int] = field(default_factory=list)
    _levels: tuple[float, ...] = ()
    _place: int = 0
    _same_input: bool = True
    _seen: dict[Hashable, int] = field(default_factory=dict)
    _known: OrderedDict[Hashable, list[tuple[Hashable, int]]] = field(default_factory=OrderedDict)

    def clear(self) -> None:
        """Let the next call begin new images."""
        self._levels, self._images = (), []

    def place(self, observation: Observation) -> Position:
        """Say where a call is; one transfer from the device."""
        rows: list[list[float]] = observation.values.tolist()
        levels, alike = tuple(row[0] for row in rows), [row[1] for row in rows]
        same_input = all(value == SAME for value in alike)
        moved = any(row[2] > ROUNDED for row in rows) and all(value >= RESEMBLES for value in alike)
        same_step = levels == self._levels and (same_input or moved)
        name = observation.branch
        loops = self._place + 1 >= MOST_BRANCHES if name is None else name in self._seen
        if same_step and loops:  # a loop over one call, or a run that was broken off in its first step
            self.clear()
            same_step = False
        if same_step:
            self._place, self._same_input = self._place + 1, self._same_input and same_input
        else:
            self._begin_step(levels, alike, told=observation.step is not None)
        conditions = [tuple(row[3:]) for row in rows]
        branch = self._branch(name, conditions)
        images = tuple(zip(self._images, conditions, strict=True))
        steps = self._count(branch, images, observation.step)
        return Position(branch, self._place, images, steps, self.run, self._same_input)

    def _begin_step(self, levels: tuple[float, ...], alike: list[float], told: bool) -> None:
        """Note a new step, and the samples whose image begins with it."""
        known = len(levels) == len(self._levels)
        begins = [
            not known or (not told and (level > before or value < RESEMBLES))
            for level, before, value in zip(levels, self._levels if known else levels, alike, strict=True)
        ]
        if all(begins):
            self.run += 1
            self._known.clear()
        images = self._images if known else [0] * len(levels)
        for sample, new in enumerate(begins):
            if new:
                self._image += 1
                images[sample] = self._image
        self._images, self._levels, self._place, self._same_input, self._seen = images, levels, 0, True, {}

    def _branch(self, name: str | None, conditions: list[tuple[float, ...]]) -> Hashable:
        """Tell a branch by its name or by what it is conditioned on; equal calls in one step by their order."""
        key: Hashable = name
        if name is None:
            key = next((known for known in self._known if _shares(known, conditions)), ("condition", *conditions))
        count = self._seen.get(key, 0)
        self._seen[key] = count + 1
        return key if not count else ("again", count, key)

    def _count(self, branch: Hashable, images: tuple[Hashable, ...], told: int | None) -> tuple[int, ...]:
        """Count the steps of a branch, sample by sample."""
        before = self._known.pop(branch, [])
        before = before if len(before) == len(images) else [(None, -1)] * len(images)
        counted = [
            (image, step + 1 if image == last else 0) for image, (last, step) in zip(images, before, strict=True)
        ]
        self._known[branch] = counted
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return tuple(step if told is None else told for _, step in counted)


def _shares(branch: Hashable, conditions: list[tuple[float, ...]]) -> bool:
    """Whether a known branch without a name has the conditioning of at least one sample."""
    if not (isinstance(branch, tuple) and branch[0] == "condition" and len(branch) == len(conditions) + 1):
        return False
    return any(known == now for known, now in zip(branch[1:], conditions, strict=True))


class Trajectory:
    """The trajectory that a model is on.

    Attributes:
        branch: name of the guidance branch of the calls to come, where a pipeline says so.
        step: index of the step of the calls to come, where a pipeline says so.
    """

    def __init__(self) -> None:
        self.branch: str | None = None
        self.step: int | None = None
        self._tracker = Tracker()
        self._input: Tensor | None = None  # a copy, since latents may be written over
        self._predicted: list[Tensor] = []  # from that input, copies too
        self._source: tuple[Any, int] | None = None
        self._unplaced = self._observed = False

    def __reduce__(self) -> Any:
        return Trajectory, ()  # a copy of a model begins its own

    def begin(self) -> None:
        """Begin a trajectory: the next call takes nothing over."""
        self._tracker.clear()
        self.step = None

    end = begin

    def fork(self) -> Trajectory:
        """Make a trajectory that goes on from here without an effect on this one."""
        other = Trajectory()
        other.branch, other.step = self.branch, self.step
        other._input, other._source, other._predicted = self._input, self._source, list(self._predicted)
        other._tracker = copy.deepcopy(self._tracker)
        return other

    @torch.no_grad()
    def observe(self, arguments: Mapping[str, Any], level: Tensor) -> Observation:
        """Look at a call before it is made.

        Args:
            arguments: of the call, by name.
            level: (B,) or (1,) fp32 noise levels.
        """
        if self._unplaced:  # nobody asked where the call before was, so that what is known is older than it
            self._tracker.clear()
        self._unplaced = self._observed = True
        x = main_input(arguments)
        if x is None or x.is_meta:
            unknown = torch.full_like(level, UNKNOWN)
            return Observation(torch.stack([level, unknown, unknown], dim=1), self.branch, self.step)
        batch, device = len(x), x.device
        columns = [level.to(device).expand(batch)[:, None], self._compared(x.detach())]
        return Observation(torch.cat([*columns, conditioning(arguments, batch, device)], dim=1), self.branch, self.step)

    def position(self, observation: Observation | None, batch: int) -> Position:
        """Say where the call that was observed last is; asked once a call.

        Args:
            observation: None where the call could not be observed; then every sample begins a new image.
            batch: B.
        """
        if observation is None:
            self._tracker.clear()
            observation = Observation(torch.tensor([[0.0, UNKNOWN, UNKNOWN]] * batch), self.branch)
        self._unplaced = False
        return self._tracker.place(observation)

    @torch.no_grad()
    def note(self, output: Any) -> None:
        """Note what the model predicted in the call that was observed last.

        Args:
            output: whatever the model returned. With guidance as halves of a batch, each half explains the other, too.
        """
        x, self._observed = self._input if self._observed else None, False
        prediction = None if x is None else as_input(output, x)
        if prediction is None or len(self._predicted) >= 2 * _PREDICTIONS:
            return
        prediction = prediction.detach().clone()
        half = len(prediction) // 2
        self._predicted.append(prediction)
        if len(prediction) % 2 == 0:
            self._predicted.append(torch.cat([prediction[half:], prediction[:half]]))

    def _compared(self, x: Tensor) -> Tensor:
        """(B, 2) comparison of an input with the one before, which it replaces."""
        before, source, version = self._input, self._source, _version(x)
        if source is not None and source[0]() is x and version is not None and source[1] == version:
            return torch.tensor([SAME, 0.0], device=x.device).expand(len(x), 2)
        compared = torch.full((len(x), 2), UNKNOWN, device=x.device)
        if before is not None and before.shape == x.shape and before.device == x.device:
            compared = compare(x, [before, *self._predicted])
            if not x.is_cuda and bool((compared[:, 0] == SAME).all()):
                return compared
        self._input, self._predicted = x.clone(), []
        self._source = (weakref.ref(x), -1 if version is None else version)
        return compared


def _version(x: Tensor) -> int | None:
    """How often a tensor was written to; None where that is not counted."""
    return None if x.is_inference() else x._version
