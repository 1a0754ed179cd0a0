"""DepthSkip at work."""

from __future__ import annotations

from dataclasses import dataclass

from tokdyn.attach.run import Run
from tokdyn.methods import DepthSkip


@dataclass(frozen=True)
class Skipping:
    """A gate on every block, by the noise level.

    The samples of a call share their blocks: a block is skipped if it is skipped at the level of every sample. Samplers
    call with one level; while training, where levels differ, see `Run.level`.
    """

    method: DepthSkip
    depth: int

    def skips(self, run: Run, block: int) -> bool:
        """Whether the table skips this block at this noise level."""
        return all(block in self.method.skipped(level, self.depth) for level in set(run.level))
