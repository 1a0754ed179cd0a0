"""Skipping blocks, depending on the noise level: by hand, by calibration, or by learned gates."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.method_names import ALIASES
from tokdyn.methods.base import Method, Sizes, Stage, Traits
from tokdyn.methods.layers import Linear
from tokdyn.methods.registry import register_method
from tokdyn.ops import timestep_frequencies
from tokdyn.reading import shown

Rows = tuple[tuple[float, float, tuple[int, ...]], ...]
"""Rows (low, high, blocks): these blocks are skipped at noise levels from low to high, both included."""

IDLE = "it names no block to skip; give blocks or learned=True, or calibrate it with tokdyn.calibrate"


@register_method
class DepthSkip(Method):
    """Settings of depth skipping. A skipped block returns its input. Give one of `blocks`, `table` and `learned`.

    Learned gates start open. In training every block runs; each gate is drawn with Gumbel noise, multiplies the change
    of its block by 0 or 1, and gets its gradient through a sigmoid. `tokdyn.losses` then has the loss
    `2 (r - target)^2`, where r is the mean share of the blocks' FLOPs whose gates are open. In sampling a gate depends
    on the noise level only, and a block whose gate is shut does not run.

    Attributes:
        blocks: the blocks to skip; negative numbers count from the end.
        levels: lowest and highest noise level at which `blocks` are skipped; 1 is pure noise.
        table: blocks to skip at each noise level, as calibration writes it: rows (low, high, blocks).
        learned: train a gate for each block, as a function of the noise level.
        target: share of the blocks' FLOPs at which the loss holds learned gates.
        loss_weight: weight of the loss of learned gates.
        fingerprint: identifies the model that the table was calibrated on; `wrap` warns about another model.
    """

    aliases: ClassVar[tuple[str, ...]] = ALIASES["DepthSkip"]

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
            raise InputError("blocks, table and learned=True each decide which blocks are skipped; give only one.")
        for low, high in (self.levels, *((low, high) for low, high, _ in self.table)):
            if not 0.0 <= low < high <= 1.0:
                raise InputError(
                    f"blocks cannot be skipped at noise levels from {low:g} to {high:g}; give a lower and a higher "
                    "level within 0 to 1."
                )
        return self

    def rows(self, depth: int) -> Rows:
        """Return the table, or `blocks` and `levels` as a table, with blocks counted from the front.

        Args:
            depth: number of blocks of the model.

        Raises:
            InputError: the model does not have one of the blocks.
        """
        rows = self.table or ((*self.levels, self.blocks),)
        for block in (block for _, _, blocks in rows for block in blocks):
            if not -depth <= block < depth:
                raise InputError(
                    f"DepthSkip: there is no block {shown(block)} in a model of {depth} blocks; they are 0 to "
                    f"{depth - 1}."
                )
        return tuple((low, high, tuple(sorted({block % depth for block in blocks}))) for low, high, blocks in rows)

    def skipped(self, level: float, depth: int) -> frozenset[int]:
        """Return the blocks that `table` or `blocks` skip at a noise level, in a model of `depth` blocks."""
        return frozenset(block for low, high, blocks in self.rows(depth) if low <= level <= high for block in blocks)

    def build(self, sizes: Sizes) -> SkipGates | None:
        """Build the gates if they are learned; None otherwise."""
        return SkipGates(sizes.depth) if self.learned else None

    def traits(self, depth: int) -> Traits:
        """Return the traits: the method decides about the blocks that it may skip, by the noise level."""
        rows = self.rows(depth)
        return Traits(
            Stage.BLOCK,
            needs_level=self.learned or any(blocks and (low, high) != (0.0, 1.0) for low, high, blocks in rows),
            owns={"skipping": None if self.learned else frozenset(block for _, _, blocks in rows for block in blocks)},
            learns="FLOPs" if self.learned else None,
            target=self.target if self.learned else None,
            diverges=self.learned or any((low, high) != (0.0, 1.0) for low, high, blocks in rows if blocks),
            idle=None if self.learned or any(blocks for _, _, blocks in rows) else IDLE,
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Return one example each that skips at all noise levels, at some, and by learned gates."""
        return cls(blocks=(1,)), cls(blocks=(1,), levels=(0.5, 1.0)), cls(learned=True)


class SkipGates(nn.Module):
    """One gate for each block, a linear function of sines and cosines of the noise level.

    Args:
        depth: number of blocks.
    """

    FREQUENCIES = 256
    OPEN = 5.0  # initial logit, with which a gate is drawn shut once in 150 times

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.score = Linear(self.FREQUENCIES, depth)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, self.OPEN)

    def forward(self, level: Tensor) -> Tensor:
        """Compute the logits (B, depth) of the gates at noise levels (B,); a gate is open above 0."""
        frequencies = timestep_frequencies(1000.0 * level, self.FREQUENCIES)
        with torch.autocast(level.device.type, enabled=False):
            logits: Tensor = self.score(frequencies)
            return logits
