"""Training on some of the tokens: a random part of them passes by a span of blocks.

Source: TREAD, arXiv 2501.04765.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tokdyn.methods.base import Method, Span, Stage, Traits, resolve
from tokdyn.methods.registry import register_method


@register_method
class TokenDrop(Method):
    """Settings of token dropping. Acts in training only; nothing is trained.

    With `tokdyn.dropping` it acts in sampling too, for guidance by a prediction that saw fewer tokens.

    Attributes:
        rate: share of the tokens that passes by the span, in [0, 1).
        blocks: first and last block of the span; None is the paper's stretch, blocks 2 to 8 of 12, in proportion.
        seed: of the subsets in sampling, which follow from it, the noise level and the cell.
    """

    aliases: ClassVar[tuple[str, ...]] = ("tread",)

    rate: float = Field(default=0.5, ge=0.0, lt=1.0)
    blocks: Span | None = None
    seed: int = 0

    def traits(self, depth: int) -> Traits:
        """A random subset inside a span, while training."""
        paper = depth // 6, max(depth // 6, 2 * depth // 3)
        span = paper if self.blocks is None else resolve(self.blocks, depth, "TokenDrop")
        return Traits(
            Stage.SPAN,
            tokens="subset",
            moving=True,
            reads="count",
            phases=frozenset({"train"}),
            span=span,
            controls=frozenset({"drop_rate"}),
        )
