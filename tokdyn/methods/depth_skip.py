"""Skipping blocks, depending on the noise level: by hand, by calibration, or learned."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Sizes, Stage, Traits
from tokdyn.methods.layers import Linear
from tokdyn.methods.registry import register_method
from tokdyn.ops import timestep_frequencies

Rows = tuple[tuple[float, float, tuple[int, ...]], ...]


@register_method
class DepthSkip(Method):
    """Settings of depth skipping; a skipped block returns what it was given.

    Learned gates start open. Training draws each gate with Gumbel noise and passes its gradient through a sigmoid; the
    loss 2 (r - target)^2, r the share of the blocks' FLOPs that ran on average, is in `tokdyn.losses`. In evaluation a
    gate is open or shut by the noise level alone, and what is shut is not computed.

    Attributes:
        blocks: skip these blocks; negative numbers count from the end.
        levels: the noise levels between which `blocks` are skipped; 1 is pure noise.
        table: what a calibration found: rows (low, high, blocks) of noise levels and the blocks skipped there.
        learned: train one gate for each block and noise level.
        target: share of the blocks' FLOPs that learned gates end up with.
        loss_weight: of the FLOPs loss of learned gates.
        fingerprint: what the table was calibrated on; another model is warned about.
    """

    aliases: ClassVar[tuple[str, ...]] = ("skip",)

    blocks: tuple[int, ...] = ()
    levels: tuple[float, float] = (0.0, 1.0)
    table: Rows = ()
    learned: bool = False
    target: float = Field(default=0.7, gt=0.0, le=1.0)
    loss_weight: float = Field(default=1.0, ge=0.0)
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> DepthSkip:
        if bool(self.blocks) + bool(self.table) + self.learned > 1:
            raise InputError("give one of blocks, table and learned=True; they all decide which blocks are skipped.")
        for low, high in (self.levels, *((low, high) for low, high, _ in self.table)):
            if not 0.0 <= low < high <= 1.0:
                raise InputError(f"the noise levels {low:g} to {high:g} are no stretch within 0 to 1.")
        return self

    def rows(self, depth: int) -> Rows:
        """The table in force, with blocks counted from the front.

        Raises:
            InputError: a block that the model does not have.
        """
        rows = self.table or ((*self.levels, self.blocks),)
        for block in (block for _, _, blocks in rows for block in blocks):
            if not -depth <= block < depth:
                raise InputError(f"there is no block {block} in a model of {depth} blocks; they are 0 to {depth - 1}.")
        return tuple((low, high, tuple(sorted({block % depth for block in blocks}))) for low, high, blocks in rows)

    def skipped(self, level: float, depth: int) -> frozenset[int]:
        """The blocks that are skipped at a noise level, without learned gates."""
        return frozenset(block for low, high, blocks in self.rows(depth) if low <= level <= high for block in blocks)

    def build(self, sizes: Sizes) -> SkipGates | None:
        """The gates, if they are learned."""
        return SkipGates(sizes.depth) if self.learned else None

    def traits(self, depth: int) -> Traits:
        """It decides for the blocks it may skip."""
        rows = self.rows(depth)
        return Traits(
            Stage.BLOCK,
            needs_level=self.learned or any(blocks and (low, high) != (0.0, 1.0) for low, high, blocks in rows),
            owns={"skipping": None if self.learned else frozenset(block for _, _, blocks in rows for block in blocks)},
            learns="FLOPs" if self.learned else None,
            target=self.target if self.learned else None,
            diverges=self.learned or any((low, high) != (0.0, 1.0) for low, high, blocks in rows if blocks),
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Skip at all levels, at some, and by learned gates."""
        return cls(blocks=(1,)), cls(blocks=(1,), levels=(0.5, 1.0)), cls(learned=True)


class SkipGates(nn.Module):
    """One gate for each block: a linear function of the sines and cosines of the noise level."""

    FREQUENCIES = 256
    OPEN = 5.0  # a gate that starts so is drawn shut once in 150 times

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.score = Linear(self.FREQUENCIES, depth)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, self.OPEN)

    def forward(self, level: Tensor) -> Tensor:
        """Logits (B, depth) at noise levels (B,)."""
        frequencies = timestep_frequencies(1000.0 * level, self.FREQUENCIES)
        with torch.autocast(level.device.type, enabled=False):
            logits: Tensor = self.score(frequencies)
            return logits
