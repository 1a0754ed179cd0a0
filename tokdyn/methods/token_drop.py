"""Training with fewer tokens: a random share of them skips a span of blocks (TREAD, arXiv 2501.04765)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tokdyn.method_names import ALIASES
from tokdyn.methods.base import Method, Span, Stage, Traits, resolve
from tokdyn.methods.registry import register_method


@register_method
class TokenDrop(Method):
    """Settings of token dropping. It acts in training only, and has no trainable parts.

    Inside of `tokdyn.dropping` it acts in sampling too, to make the weak prediction of guidance. `tokdyn.keeping` names
    tokens that are never dropped.

    Attributes:
        rate: share of the tokens that skips the span, in [0, 1).
        blocks: first and last block of the span; None is the span of the paper, blocks 2 to 8 of 12, scaled to the
            depth of the model.
        seed: seed of the tokens dropped in sampling, which also depend on the noise level and the cell.
    """

    aliases: ClassVar[tuple[str, ...]] = ALIASES["TokenDrop"]

    rate: float = Field(default=0.5, ge=0.0, lt=1.0)
    blocks: Span | None = None
    seed: int = Field(default=0, gt=-(2**40), lt=2**40)

    def traits(self, depth: int) -> Traits:
        """Return the traits: in training, a random subset of the tokens in a span of blocks."""
        paper = depth // 6, max(depth // 6, 2 * depth // 3)
        span = paper if self.blocks is None else resolve(self.blocks, depth, "TokenDrop")
        return Traits(
            Stage.SPAN,
            tokens="subset",
            moving=True,
            reads="count",
            phases=frozenset({"train"}),
            span=span,
            controls=frozenset({"drop_rate", "keep"}),
            short="that is less than one token; raise the rate",
        )
