"""Token merging around attention, the MLP, or both: similar tokens share one computation.

ToMe for diffusion (arXiv 2303.17604); weighting by size from ToMe (arXiv 2210.09461).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tokdyn.errors import InputError
from tokdyn.method_names import ALIASES
from tokdyn.methods.base import Method, Span, Stage, Traits, resolve
from tokdyn.methods.registry import register_method
from tokdyn.ops.schedules import Curve, check_curve


@register_method
class TokenMerge(Method):
    """Settings of token merging. It needs no training.

    The grid is divided into buckets of neighbouring cells. One token of each bucket is a destination; other tokens are
    averaged with the destination that they are most similar to, and get the sublayer's result for it.

    Attributes:
        ratio: share of the generated tokens that is merged into others, in [0, 1), or points (noise level, share) that
            are interpolated. At most all but the destinations are merged: 0.75 on a full grid with 2 x 2 buckets.
        where: the sublayers of a block that compute on merged tokens.
        partition: "bucket" works on any set of tokens; "grid" refuses to be combined with methods that leave tokens
            out.
        bucket: cells of a bucket along each axis.
        seed: choose destinations at random, depending on this seed, the noise level and the cell; None takes the first
            cell of each bucket.
        important: let the token with the largest norm be the destination of its bucket.
        blocks: first and last block in which tokens are merged; None for all blocks.
        weighted: add the logarithm of the number of tokens that a merged token stands for to its logits as a key
            (arXiv 2210.09461).
        reuse: number of consecutive blocks that use the matching of the first of them.
        reuse_steps: number of consecutive steps that use the matching of the first of them, for each sample and
            guidance branch; another image or prompt is matched anew. Compiled models match in every step.
        window: the most cells, along every axis or along each, of the windows of the grid in which tokens look for a
            destination. None compares all tokens with all destinations on grids of up to 2,048 cells, and divides
            larger ones into windows of at most 1,024, so that time and memory grow in proportion to the tokens.
        metric_width: number of channels, in evenly spaced runs, by which tokens are compared; None for all.
        references: "keep" leaves the tokens of reference images as they are; "merge" merges the tokens of each of them
            among themselves, by the same ratio. None is ever merged with a token of the generated image.
    """

    aliases: ClassVar[tuple[str, ...]] = ALIASES["TokenMerge"]

    ratio: Curve = 0.5
    where: Literal["attention", "mlp", "both"] = "attention"
    partition: Literal["bucket", "grid"] = "bucket"
    bucket: int = Field(default=2, ge=2)
    seed: int | None = Field(default=None, gt=-(2**40), lt=2**40)
    important: bool = False
    blocks: Span | None = None
    weighted: bool = False
    reuse: int = Field(default=1, ge=1)
    reuse_steps: int = Field(default=1, ge=1)
    window: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] | None = None
    metric_width: int | None = Field(default=None, ge=1)
    references: Literal["keep", "merge"] = "keep"

    @field_validator("ratio")
    @classmethod
    def _shares(cls, ratio: Curve) -> Curve:
        check_curve(ratio, 0.0, 0.999)
        return ratio

    @model_validator(mode="after")
    def _with_effect(self) -> Self:
        if self.weighted and self.where == "mlp":
            raise InputError(
                "weighted=True acts on the keys of attention, but where='mlp' merges around the MLP only; omit one."
            )
        return self

    def traits(self, depth: int) -> Traits:
        """Return the traits: tokens are merged around sublayers; the full grid is needed if `partition` says so.

        With a ratio of 0 nothing is merged, and nothing needs to be known about the tokens.
        """
        merges = self.ratio != 0.0
        span = None if self.blocks is None else resolve(self.blocks, depth, "TokenMerge")
        where = None if span is None else frozenset(range(span[0], span[1] + 1))
        sublayers: tuple[Literal["attention", "mlp"], ...] = (
            ("attention", "mlp") if self.where == "both" else (self.where,)
        )
        return Traits(
            Stage.SUBLAYER,
            tokens="merged" if merges else "full",
            reads="grid" if merges else "nothing",
            needs_grid=merges and self.partition == "grid",
            span=span,
            needs_level=not isinstance(self.ratio, float),
            owns={f"merging around {sublayer}": where for sublayer in sublayers},
            around=sublayers,
            remembers=self.reuse_steps > 1,
            controls=frozenset({"keep"}),
            weighs_keys=self.weighted,
            short="one token of every bucket stays, for others to be merged into; lower ratio or enlarge bucket",
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Return one example for each `where`, one with a curve over noise levels and one with weighted keys."""
        curve = ((0.0, 0.0), (1.0, 0.5))
        return cls(), cls(where="mlp"), cls(where="both"), cls(ratio=curve), cls(weighted=True)
