"""Describe what a training step takes, whatever computes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Weight:
    """A tensor of weights. FSDP2 gives each of n GPUs as many of its rows, and pads it to a multiple of n rows.

    Attributes:
        rows: size of its first axis.
        row: bytes of a row.
        trained: whether it has a gradient.
    """

    rows: int
    row: int
    trained: bool

    def shard(self, gpus: int) -> int:
        """Return the bytes that each of some GPUs holds."""
        return -(-self.rows // gpus) * self.row


Weights = tuple[Weight, ...]


def shards(weights: Iterable[Weight], gpus: int) -> int:
    """Return the bytes of some weights that each of some GPUs holds."""
    return sum(weight.shard(gpus) for weight in weights)


@dataclass(frozen=True)
class Work:
    """What a training step takes on each of its GPUs.

    Attributes:
        of: what is counted per second: "images", or "calls" of a transformer.
        batch: images of a step, on all GPUs together.
        micro_batch: images that a GPU computes at once.
        accumulation: micro-batches of a GPU in a step.
        steps: optimizer steps of the run.
        precision: "bf16" or "fp32", in which matrix products are computed.
        flops: FLOPs per image, forward, backward and recomputed passes together; a multiply-add is 2.
        units: weights of each block; FSDP2 gathers a block at a time.
        root: all other weights of the model, which FSDP2 gathers once a micro-batch and then keeps.
        averaged: whether averaged weights are kept, too.
        beside: bytes that every GPU holds whole, whatever is sharded: teachers, other parts of a pipeline, calls.
        activations: most bytes that live at a time in a micro-batch beside all of these: what is kept for the backward
            pass, and temporaries.
        passes: how often a micro-batch needs the weights of a block: forward and backward pass, and that of a teacher
            with the same weights.
    """

    of: str
    batch: int
    micro_batch: int
    accumulation: int
    steps: int
    precision: str
    flops: float
    units: tuple[Weights, ...]
    root: Weights
    averaged: bool
    beside: int
    activations: int
    passes: int = 2

    @property
    def weights(self) -> Weights:
        """All weights of the model."""
        return (*self.root, *(weight for unit in self.units for weight in unit))

    @property
    def trained(self) -> Weights:
        """Those that have gradients, of as many bytes, and moments."""
        return tuple(weight for weight in self.weights if weight.trained)


def weights_of(
    model: nn.Module, blocks: Sequence[nn.Module], trained: Iterable[nn.Parameter]
) -> tuple[tuple[Weights, ...], Weights]:
    """Return the weights of each block of a model, and all others.

    Args:
        model: The model.
        blocks: Its blocks.
        trained: The parameters that have gradients.
    """
    learned, inside = {id(each) for each in trained}, {id(each) for block in blocks for each in block.parameters()}

    def weight(parameter: nn.Parameter) -> Weight:
        rows = parameter.shape[0] if parameter.dim() else 1
        row = parameter.numel() * parameter.element_size() // max(1, rows)
        return Weight(rows, row, id(parameter) in learned)

    units = tuple(tuple(weight(each) for each in block.parameters()) for block in blocks)
    return units, tuple(weight(each) for each in model.parameters() if id(each) not in inside)
