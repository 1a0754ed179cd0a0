"""Which tokens were merged into which: what the blocks of a call share, and what is remembered from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tokdyn.ops.destinations import Destinations
from tokdyn.ops.merging import Merging, joined
from tokdyn.trace.memory import TrajectoryMemory
from tokdyn.trace.trajectory import Position

Name = tuple[int, int]
"""A sample: its position in the batch, and the number of its part, where attention splits samples."""


@dataclass(frozen=True)
class Matched:
    """The matching of a sample.

    Attributes:
        plan: the matching that it is part of.
        place: position of the sample in it.
        share: share of the tokens that was to be merged.
        step: the step in which it was made; 0 if it serves no other step.
    """

    plan: Merging
    place: int
    share: float
    step: int = 0


Plans = dict[Hashable, dict[Name, Matched]]
"""Matchings of samples, by what shares them: the sublayer, some consecutive blocks, source and grid of the view."""


@dataclass
class Matchings:
    """What the blocks of one call share.

    Attributes:
        plans: matchings that several blocks or steps use.
        windows: plans of consecutive blocks that share a matching, by their number, for blocks that are compiled by
            themselves.
        steps: the step of each sample; () if no other step uses the matchings.
        destinations: destinations that depend on cell and noise level only, by samples, source and grid of the view,
            and by the place where the tokens of an image begin.
        kept: (B, N) bool on the host, the cells of tokens that are not merged; None if there are none.
        stay: the number of tokens that are not merged, of each sample, by samples, source and grid of the view.
    """

    plans: Plans = field(default_factory=dict)
    windows: dict[int, Plans] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    destinations: dict[Hashable, Destinations] = field(default_factory=dict)
    kept: Tensor | None = None
    stay: dict[Hashable, list[int]] = field(default_factory=dict)

    def enter(self, place: int, reuse: int) -> int:
        """Find the plans of a compiled block, the number `place` of those that merge; `reuse` blocks share a plan.

        Returns:
            The number of the first block that matches, or uses a matching, as this one does.
        """
        window, place = divmod(place, reuse)
        if reuse > 1:
            self.plans = self.windows.setdefault(window, {})
        return min(place, 1)

    def plan(
        self, key: Hashable, samples: Sequence[int], shares: Sequence[float], make: Callable[[], Merging | None]
    ) -> Merging | None:
        """Return the matching of some samples, made now if one of them has none; None if no token is merged.

        Args:
            key: of `plans`.
            samples: positions in the batch; the parts of a sample have the same.
            shares: share of the tokens to merge, of each sample.
            make: matches all of these samples.
        """
        plans = self.plans.setdefault(key, {})
        names = [(sample, samples[:place].count(sample)) for place, sample in enumerate(samples)]
        known = [plans.get(name) for name in names]
        new = [i for i, each in enumerate(known) if each is None or each.share != shares[i]]
        if new:  # of another image, or of samples that skipped the block in which the others were matched
            plan = make()
            if plan is None:
                return None
            for i in new:
                step = self.steps[names[i][0]] if self.steps else 0
                plans[names[i]] = Matched(plan, i, shares[i], step)
        matched = [plans[name] for name in names]
        first = matched[0].plan
        whole = len(first.lengths) == len(names)
        if whole and all(each.plan is first and each.place == i for i, each in enumerate(matched)):
            return first
        return joined([one.plan.sample(one.place) for one in matched])


@dataclass
class BranchMatchings:
    """What is remembered of one guidance branch.

    Attributes:
        images: for each sample an identifier of its image and conditioning.
        mask: the mask of tokens to keep that the matchings were made with.
        plans: the matchings.
    """

    images: tuple[Hashable, ...] = ()
    mask: Tensor | None = None
    plans: Plans = field(default_factory=dict)


class MatchingMemory(TrajectoryMemory[BranchMatchings]):
    """Which matchings are remembered of the current trajectory."""

    def fork(self) -> MatchingMemory:
        """Return a copy that can be changed without an effect on this memory. Tensors are shared."""
        copies = (
            (key, BranchMatchings(each.images, each.mask, {name: dict(plans) for name, plans in each.plans.items()}))
            for key, each in self.branches.items()
        )
        return MatchingMemory(self.trajectory, OrderedDict(copies))

    def of(self, position: Position, steps: int, mask: Tensor | None) -> Plans:
        """Return the matchings that a call may reuse, in a dictionary that remembers what is added to it.

        Those of another image or conditioning, of earlier steps than serve this one, and those made with another mask
        are forgotten.

        Args:
            position: of the call.
            steps: how many steps one matching serves.
            mask: the mask of tokens to keep.
        """
        self.enter(position)
        branch = self.branches.pop(position.branch, None)
        if branch is None or len(branch.images) != len(position.images) or branch.mask is not mask:
            branch = BranchMatchings()
        same = [now == before for now, before in zip(position.images, branch.images or position.images, strict=True)]
        plans = {
            key: {
                name: each
                for name, each in known.items()
                if same[name[0]] and 0 <= position.steps[name[0]] - each.step < steps
            }
            for key, known in branch.plans.items()
        }
        self.put(position, BranchMatchings(position.images, mask, plans))
        return plans
