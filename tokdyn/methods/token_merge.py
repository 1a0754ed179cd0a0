"""Token merging around attention, the MLP, or both: similar tokens share one computation.

Source: ToMe for diffusion, arXiv 2303.17604; weighting by size from ToMe, arXiv 2210.09461.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Span, Stage, Traits, resolve
from tokdyn.methods.registry import register_method
from tokdyn.ops.schedules import Curve, check_curve


@register_method
class TokenMerge(Method):
    """Settings of token merging. Nothing is trained.

    Attributes:
        ratio: share of the tokens that is merged away, in [0, 1), or points (noise level, share). On a full grid with
            buckets of 2x2 cells at most 0.75 can be.
        where: which sublayers of a block see merged tokens.
        partition: "bucket" works on any set of tokens; "grid" insists on the full grid.
        bucket: cells along each axis that share a destination.
        seed: choose destinations at random, from this seed, the noise level and the cell; None takes the first cell of
            each bucket.
        important: let the token with the longest features be the destination of its bucket.
        blocks: first and last block in which tokens are merged; None is all.
        weighted: let a merged token count in attention as often as it stands for tokens (arXiv 2210.09461).
        reuse: blocks in a row that share one matching, which the first of them makes.
    """

    aliases: ClassVar[tuple[str, ...]] = ("merge", "tome")

    ratio: Curve = 0.5
    where: Literal["attention", "mlp", "both"] = "attention"
    partition: Literal["bucket", "grid"] = "bucket"
    bucket: int = Field(default=2, ge=2)
    seed: int | None = None
    important: bool = False
    blocks: Span | None = None
    weighted: bool = False
    reuse: int = Field(default=1, ge=1)

    @field_validator("ratio")
    @classmethod
    def _shares(cls, ratio: Curve) -> Curve:
        check_curve(ratio, 0.0, 0.999)
        return ratio

    @model_validator(mode="after")
    def _with_effect(self) -> Self:
        if self.weighted and self.where == "mlp":
            raise InputError("weighted counts keys of attention, but where='mlp' merges around the MLP; leave one out.")
        return self

    def traits(self, depth: int) -> Traits:
        """It merges within a sublayer, and needs the full grid only if it is told to."""
        span = None if self.blocks is None else resolve(self.blocks, depth, "TokenMerge")
        where = None if span is None else frozenset(range(span[0], span[1] + 1))
        sublayers: tuple[Literal["attention", "mlp"], ...] = (
            ("attention", "mlp") if self.where == "both" else (self.where,)
        )
        return Traits(
            Stage.SUBLAYER,
            tokens="merged",
            reads="grid",
            needs_grid=self.partition == "grid",
            span=span,
            needs_level=not isinstance(self.ratio, float),
            owns={f"merging around {sublayer}": where for sublayer in sublayers},
            around=sublayers,
            weighs_keys=self.weighted,
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Merge around each sublayer, by noise level, and with weighted keys."""
        curve = ((0.0, 0.0), (1.0, 0.5))
        return cls(), cls(where="mlp"), cls(where="both"), cls(ratio=curve), cls(weighted=True)
