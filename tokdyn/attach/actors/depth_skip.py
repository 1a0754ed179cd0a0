"""DepthSkip at work."""

from __future__ import annotations

from dataclasses import dataclass

from tokdyn.methods import DepthSkip


@dataclass(frozen=True)
class Skipping:
    """A gate on every block, by the noise level of each sample."""

    method: DepthSkip
    depth: int

    def skips(self, level: float, block: int) -> bool:
        """Whether the table skips this block at this noise level."""
        return block in self.method.skipped(level, self.depth)
