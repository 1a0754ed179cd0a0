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

    def always(self, block: int) -> bool | None:
        """The answer where the table gives the same at all levels, None where it does not."""
        rows = [(low, high) for low, high, blocks in self.method.rows(self.depth) if block in blocks]
        return False if not rows else True if (0.0, 1.0) in rows else None
