"""Which step of which guidance branch of which image each call is.

A sampling loop that knows says so: `Trajectory.begin`, `Trajectory.step`, `Trajectory.end`, names of branches. Without
it, this is guessed from what the calls look like, sample by sample, and in doubt a call begins a new image, so that
nothing is taken over.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from tokdyn.trace.branches import PERTURBED, PERTURBING, Branch, perturbs, standard
from tokdyn.trace.comparison import (
    FEW_CHANGED,
    RESEMBLES,
    SAME,
    SAMPLED,
    UNKNOWN,
    Comparison,
    InputSeen,
    Prediction,
    reads_freely,
)
from tokdyn.trace.conditioning import Conditioning, Conditions
from tokdyn.trace.observation import Observation, SampleSeen, main_input, prediction_in
from tokdyn.trace.timing import Stopwatch

ROUNDED = 0.01
"""Share by which latents may move between steps whose noise levels round to one number (bf16 has 8 bits).

More at one noise level is another branch of the step, with latents of its own.
"""
MOST_BRANCHES = 4  # calls on one input that can be branches of guidance; more are a loop over one call
_REMEMBERED = 8  # branches whose steps are counted
_PREDICTIONS = 2  # calls of a step whose predictions are kept to explain the next latents


class Position(NamedTuple):
    """The place of a call.

    Attributes:
        branch: tells the guidance branch from others: its name, or a key made of what it is conditioned on.
        place: calls of the same step before it.
        images: (B) for each sample what tells its image and its conditioning from others; something that was remembered
            for a sample holds only while this is equal.
        steps: (B) step of each sample within its image, counted for this branch.
        trajectory: number of the trajectory, counted over those that began for all samples at once.
        same_input: whether all calls of the step so far had one input; assumed where the step was told.
        num_steps: number of steps of the trajectory, where that was told.
    """

    branch: Hashable
    place: int
    images: tuple[Hashable, ...]
    steps: tuple[int, ...]
    trajectory: int
    same_input: bool = True
    num_steps: int | None = None

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
    """Turns observations into positions, one after the other; replayed on recorded ones it says the same.

    Calls at equal noise levels are branches of one step, unless their latents moved so little that the levels of two
    steps were rounded to one. A sample begins a new image where its noise level rises, its input does not resemble the
    one before, or the batch has another size.
    """

    trajectory: int = 0
    _image: int = 0
    _images: dict[int, list[int]] = field(default_factory=dict)  # by the size of the batch
    _levels: tuple[float, ...] = ()
    _told: int | None = None
    _place: int = 0
    _same_input: bool = True
    _seen: dict[Hashable, int] = field(default_factory=dict)
    _known: OrderedDict[Hashable, list[tuple[Hashable, int]]] = field(default_factory=OrderedDict)

    def clear(self) -> None:
        """Let the next call begin new images."""
        self._levels, self._images, self._told = (), {}, None

    def place(self, seen: Sequence[SampleSeen], name: Branch | None = None, told: int | None = None) -> Position:
        """Say where a call is.

        Args:
            seen: what is seen of each sample.
            name: of the guidance branch or branches, where a pipeline gave one.
            told: index of the step, where that is known; then it decides which calls belong to one step.
        """
        name = name or None
        levels, alike, moved, conditions = zip(*seen, strict=True) if seen else ((), (), (), ())
        same_input = same_step = joins = False
        if told is not None:
            same_step, same_input = told == self._told, len(levels) == len(self._levels)
        elif levels == self._levels:
            same_input = alike.count(SAME) == len(alike)
            same_step = same_input or (max(moved) > ROUNDED and min(alike) >= RESEMBLES)
        elif name is not None and self._seen and name not in self._seen and {*levels} == {*self._levels}:
            same_step = joins = True  # a branch that has another number of samples, before the first step is told
        loops = self._place + 1 >= MOST_BRANCHES if name is None else name in self._seen
        if told is None and same_step and loops:  # a loop over one call, or an image that ended in its first step
            self.clear()
            same_step = False
        if same_step:
            self._place, self._same_input = self._place + 1, self._same_input and same_input
        else:
            self._place, self._same_input, self._seen = 0, True, {}
        if not same_step or len(levels) not in self._images:
            self._begin_images(levels, alike, joins or told is not None)
        self._told = told
        branch = self._branch(name, conditions)
        images = tuple(zip(self._images[len(levels)], conditions, strict=True))
        steps = self._count(branch, images, told)
        return Position(branch, self._place, images, steps, self.trajectory, self._same_input)

    def _begin_images(self, levels: tuple[float, ...], alike: Sequence[float], told: bool) -> None:
        """Note the samples whose image begins with a call. Where the step is told, batches may differ in size."""
        known = len(levels) in self._images if told else len(levels) == len(self._levels)
        self._levels, before = levels, self._levels
        if known and told:
            return
        begins = [
            not known or level > last or value < RESEMBLES
            for level, last, value in zip(levels, before if known else levels, alike, strict=True)
        ]
        if all(begins) and not (told and self._images):
            self.trajectory += 1
            self._known.clear()
        images = self._images[len(levels)] if known else [0] * len(levels)
        for sample, new in enumerate(begins):
            if new:
                self._image += 1
                images[sample] = self._image
        self._images = {**(self._images if told else {}), len(levels): images}

    def _branch(self, name: Branch | None, conditions: Sequence[tuple[float, ...]]) -> Hashable:
        """Tell a branch by its name or by what it is conditioned on; equal calls in one step by their order."""
        key: Hashable = name
        if name is None:
            key = "condition", *conditions
            if key not in self._known:
                key = next((known for known in self._known if _shares(known, conditions)), key)
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


def _shares(branch: Hashable, conditions: Sequence[tuple[float, ...]]) -> bool:
    """Whether a known branch without a name has the conditioning of at least one sample."""
    if not (isinstance(branch, tuple) and branch[0] == "condition" and len(branch) == len(conditions) + 1):
        return False
    return any(known == now for known, now in zip(branch[1:], conditions, strict=True))


class Trajectory:
    """The trajectory that a model is on.

    Attributes:
        branch: name of the guidance branch of the calls to come, or the names of the branches in equal parts of their
            batch, such as ("uncond", "cond"), where somebody says so.
        asks: if set, says which branches a call is about, given `branch` and its input.
        step: index of the step of the calls to come, where somebody says so. Then the inputs of calls are not compared.
        steps: number of steps, where somebody says so.
        pipeline: measures how long the whole call of the pipeline takes that made the calls; None without one.
        calls: number of calls since a loop or a pipeline began that says where it is; None outside of one.
    """

    def __init__(self) -> None:
        self.branch: Branch | None = None
        self.asks: Callable[[Branch | None, Tensor], Branch | None] | None = None
        self.step: int | None = None
        self.steps: int | None = None
        self.pipeline: Stopwatch | None = None
        self.calls: int | None = None
        self._tracker = Tracker()
        self._conditioning = Conditioning(MOST_BRANCHES)
        self._now = self._before = InputSeen()
        self._observation: Observation | None = None
        self._placed = True

    def __reduce__(self) -> Any:
        return Trajectory, ()  # a copy of a model begins its own

    def begin(self, steps: int | None = None) -> None:
        """Begin a trajectory: the next call takes nothing over.

        Args:
            steps: number of its steps, where that is known.
        """
        self.interrupt()
        self.step, self.steps, self.pipeline = None, steps, None

    def end(self) -> None:
        """End the trajectory: the next call takes nothing over, and nothing is known of its steps."""
        self.begin()

    def interrupt(self) -> None:
        """Take nothing over to the next call, after one that failed."""
        self._tracker.clear()

    def fork(self) -> Trajectory:
        """Make a trajectory that goes on from here without an effect on this one."""
        other = Trajectory()
        other.branch, other.step, other.steps, other.asks = self.branch, self.step, self.steps, self.asks
        other._now = replace(self._now, predictions=list(self._now.predictions))
        other._tracker = copy.deepcopy(self._tracker)
        return other

    def observe(self, arguments: Mapping[str, Any], level: Tensor) -> Observation:
        """Look at a call before it is made.

        Args:
            arguments: of the call, by name.
            level: (B,) or (1,) fp32 noise levels.
        """
        if not self._placed and self.step is None:  # nobody asked where the call before was: what is known is older
            self._tracker.clear()
        self._placed = False
        x, before = main_input(arguments), self._now
        if x is None or x.is_meta:
            self._now, self._observation = InputSeen(), None
            nothing = Conditions(level.new_zeros(len(level), 0), [()] * len(level) if level.is_cpu else None)
            return Observation(level, nothing, UNKNOWN, self._branch_of(arguments, None), self.step)
        timer = Stopwatch(x.device)
        compared: Comparison | float = SAME
        on_host = reads_freely(x)
        if self.step is not None:
            before = self._now = InputSeen()
        self._before = before
        if self.step is None and not before.is_of(x):
            self._now = InputSeen.of(x, before.elements if x.shape == before.shape else SAMPLED, on_host)
            compared = Comparison(self._now, before) if before.fits(self._now) else UNKNOWN
        conditions = self._conditioning.of(arguments, x, on_host)
        unknown = self.branch is None and self.asks is None and PERTURBING.isdisjoint(arguments)
        branch = None if unknown else self._branch_of(arguments, x)
        seen = self._observation = Observation(level, conditions, compared, branch, self.step)
        seen.timer = timer
        return seen

    def _branch_of(self, arguments: Mapping[str, Any], x: Tensor | None) -> Branch | None:
        """Say what is known of the branches of a call with these arguments and this input."""
        branch = standard(self.branch) if isinstance(self.branch, str) else self.branch
        if not branch and perturbs(arguments):
            return PERTURBED
        return branch if self.asks is None or x is None else self.asks(branch, x)

    def name(self, observation: Observation | None) -> str | None:
        """Return the name of the one branch that a call is about; None if it has none, or is about several."""
        branch = self.branch if observation is None else observation.branch
        return branch if isinstance(branch, str) else None

    def position(self, observation: Observation | None, batch: int) -> Position:
        """Say where the call that was observed last is; asked once a call.

        Args:
            observation: None where the call could not be observed; then every sample begins a new image.
            batch: B.
        """
        self._placed = True
        if observation is None:
            self._tracker.clear()
            return self._tracker.place([SampleSeen(0.0, UNKNOWN, UNKNOWN)] * batch, self.branch)
        if observation is self._observation and observation.step is None:
            self._learn(observation)
        position = self._tracker.place(observation.samples, observation.branch, observation.step)
        return position if self.steps is None else position._replace(num_steps=self.steps)

    def _learn(self, observation: Observation) -> None:
        """Let what is seen of a call decide what the next one is compared with."""
        alike = [each.alike for each in observation.samples]
        if self._now is not self._before and alike.count(SAME) == len(alike):
            self._now = self._before  # a copy of the input before: both calls explain what follows
        elif FEW_CHANGED in alike:
            x = None if self._now.source is None else self._now.source()
            unseen = replace(self._now, elements=sys.maxsize, values=None)
            self._now = unseen if x is None else InputSeen.of(x, sys.maxsize, self._now.on_host)

    def note(self, output: Any) -> None:
        """Note what the model predicted in the call that was observed last, whatever the model returned."""
        observation, self._observation = self._observation, None
        if self.calls is not None:
            self.calls += 1
        if observation is None:
            return
        if observation.timer is not None:
            observation.timer.stop()
        if not self._placed and observation.on_host:
            self._learn(observation)
        now = self._before = self._now
        if now.values is None or len(now.predictions) >= _PREDICTIONS:
            return
        value = prediction_in(output)
        noted = None if value is None or value.device != now.values.device else Prediction.of(value, now)
        if noted is not None:
            now.predictions.append(noted)
