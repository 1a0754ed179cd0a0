"""DepthSkip at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tokdyn.attach.run import Run
from tokdyn.methods import DepthSkip, Sizes, SkipGates
from tokdyn.ops.skipping import gate


@dataclass(frozen=True)
class Skipping:
    """A gate on every block, by the noise level of each sample."""

    method: DepthSkip
    depth: int

    def always(self, run: Run, block: int) -> bool | None:
        """The answer where the table gives the same at all levels, None where it does not."""
        rows = [(low, high) for low, high, blocks in self.method.rows(self.depth) if block in blocks]
        return False if not rows else True if (0.0, 1.0) in rows else None

    def skips(self, run: Run, block: int) -> Sequence[bool]:
        """What the table says for each sample."""
        known = {level: block in self.method.skipped(level, self.depth) for level in set(run.level)}
        return [known[level] for level in run.level]

    def weight(self, run: Run, block: int) -> Tensor | None:
        """Nothing is learned."""
        return None


@dataclass(frozen=True)
class LearnedSkipping:
    """A gate on every block that is trained; see `tokdyn.methods.DepthSkip`."""

    method: DepthSkip
    module: SkipGates
    sizes: Sizes

    def always(self, run: Run, block: int) -> bool | None:
        """In training every block runs."""
        return False if run.training else None

    def skips(self, run: Run, block: int) -> Sequence[bool]:
        """What the gates say at the noise level of each sample; they are asked once in a call."""
        if id(self) not in run.kept:
            shut = self._logits(run) <= 0
            run.kept[id(self)] = [run.per_sample(column, "the timestep") for column in shut.T.tolist()]
        skipped: Sequence[bool] = run.kept[id(self)][block]
        return skipped

    def weight(self, run: Run, block: int) -> Tensor | None:
        """In training 0 or 1 for every sample, with a gradient; all gates are drawn at the first block."""
        if not run.training:
            return None
        if id(self) not in run.kept:
            drawn = gate(self._logits(run).expand(run.batch, -1), training=True)
            cost = drawn.new_tensor(self.sizes.weights) / sum(self.sizes.weights)
            ran = (drawn * cost).sum(dim=1).mean()
            run.add_loss("DepthSkip", self.method.loss_weight * 2.0 * (ran - self.method.target) ** 2)
            run.kept[id(self)] = drawn
        weight: Tensor = run.kept[id(self)][:, block]
        return weight

    def _logits(self, run: Run) -> Tensor:
        """(B, depth) or (1, depth) what the gates are open by."""
        clock, score = run.clock(run.device), self.module.score
        run.record.spend("DepthSkip gates", 2 * len(clock) * score.in_features * score.out_features)
        logits: Tensor = self.module(clock)
        return logits
