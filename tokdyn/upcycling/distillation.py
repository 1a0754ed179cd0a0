"""Distill a student from its frozen base, the teacher: compare the outputs of their blocks, and their predictions.

A cell is the square of pixels that becomes one token of a DC-DiT; a patch of the teacher covers several cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokdyn.attach import attachment_of, disabled
from tokdyn.attach import losses as method_losses
from tokdyn.errors import InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.tokens import Grid, Packing


def cells_per_patch_side(student: DCDiT) -> int:
    """Return the number of a DC-DiT's cells along the side of a patch of the DiT that it was made from.

    Raises:
        InputError: The DC-DiT was not made from a DiT.
    """
    scale = float(student.config.position_scale)
    if scale >= 1.0:
        raise InputError(
            "The DC-DiT was not made from a DiT, because its position_scale is 1; make one with "
            "tokdyn.upcycle(base, 'dc')."
        )
    return round(1.0 / scale)


def corner_plan(grid: Grid, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the fixed plan: a mask of the tokens to keep, which are those of the upper left cell of every patch.

    Args:
        grid: (rows, columns) of the DC-DiT.
        side: Cells along a side of a patch.
        device: Device of the result.

    Returns:
        (N,) bool. The kept tokens correspond to the tokens of the base, both in raster order.
    """
    rows, columns = (torch.arange(size, device=device) % side == 0 for size in grid)
    return rearrange(rows[:, None] & columns, "rows columns -> (rows columns)")


def patch_of(cell: Tensor, grid: Grid, side: int) -> Tensor:
    """Return the index of the patch that each cell lies in.

    Args:
        cell: (T,) int64 indices of cells, in raster order.
        grid: (rows, columns) of the DC-DiT.
        side: Cells along a side of a patch.

    Returns:
        (T,) int64 indices of patches, in raster order.
    """
    row, column = cell // grid[1], cell % grid[1]
    return (row // side) * (grid[1] // side) + column // side


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error between student and teacher, divided by the teacher's variance.

    Args:
        student: (T, D).
        teacher: (T, D), without gradient.

    Returns:
        A scalar. The variance is that over the T rows, averaged over channels, so a student that predicts the teacher's
        mean in every channel reaches 1.
    """
    target = teacher.float()
    variance = (target - target.mean(dim=0)).square().mean().clamp(min=1e-12)  # `var` takes three times as long
    return (student.float() - target).square().mean() / variance


def image_variances(teacher: Tensor) -> Tensor:
    """Return the variance of each image's tokens (B, N, D) over its tokens, averaged over channels: (B,) fp32."""
    target = teacher.float()
    spread = (target - target.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2))  # `var` takes three times as long
    return spread.clamp(min=1e-12)


def image_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error of each image, divided by the variance of the teacher's tokens; mean over images.

    No image has a part in the error of another one, so the mean of the errors of two batches is that of both together.

    Args:
        student: (B, N, D).
        teacher: (B, N, D), without gradient.

    Returns:
        A scalar; 1 for a student that predicts the mean of every channel in each image.
    """
    errors = (student.float() - teacher.float()).square().mean(dim=(1, 2))
    return (errors / image_variances(teacher)).mean()


@dataclass(frozen=True)
class LossTerms:
    """What a call of `Distillation` computes beside the student's prediction.

    Attributes:
        blocks: Compute the loss "teacher", between the outputs of the student's blocks and those of the teacher's.
        output: Compute the loss "output", between the student's prediction and the teacher's.
        complete: Compute the prediction of the student with its methods disabled. It is not a loss.
    """

    blocks: bool = False
    output: bool = False
    complete: bool = False


class Distillation(nn.Module):
    """A module that runs a student together with its frozen teacher.

    The teacher is not a submodule, so it is neither trained, saved nor sent to other processes.

    Args:
        student: A `DCDiT` from `to_dc`, or a copy of the teacher; either may be wrapped.
        teacher: The base, which is set to evaluation mode and frozen; None if no phase compares with it.
    """

    def __init__(self, student: Any, teacher: DiT | None) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # torch does not register modules inside a tuple
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    @property
    def teacher(self) -> DiT:
        """The teacher.

        Raises:
            InputError: There is no teacher.
        """
        (teacher,) = self._teacher
        if teacher is None:
            raise InputError("There is no teacher to compare the student with; pass the base to Distillation.")
        return teacher

    def forward(
        self,
        terms: LossTerms,
        on_fixed_plan: Tensor,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        tail_drop: float | Tensor = 0.0,
    ) -> tuple[Any, Tensor | None, dict[str, Tensor]]:
        """Run the student, and the teacher if `terms` compare the two.

        Args:
            terms: What to compute beside the student's prediction.
            on_fixed_plan: (B,) bool, True for samples that keep the tokens of the fixed plan (see `corner_plan`). The
                others keep those that the student's router chooses. A student that is not a `DCDiT` ignores it.
            hidden_states: (B, C, rows, columns) noisy images.
            timestep: (B,) timesteps.
            class_labels: (B,) classes.
            tail_drop: Share of the kept tokens that a `DCDiT` drops, a number or (B,).

        Returns:
            The output of the student; its prediction with methods disabled, or None; and the losses by name. "teacher"
            is the normalised error between each token and the teacher's token of its patch, mean over the blocks;
            "output" is the normalised error of the prediction; further ones are the losses of attached methods.
        """
        inputs = (hidden_states, timestep, class_labels)
        arguments: dict[str, Any] = {}
        if isinstance(self.student, DCDiT):
            side = cells_per_patch_side(self.student)
            plan = corner_plan(self._grid(hidden_states), side, hidden_states.device)
            arguments = {"tail_drop": tail_drop, "plan": on_fixed_plan[:, None] & plan}
        with torch.inference_mode(), _outputs_of(self.teacher.blocks if terms.blocks else []) as theirs:
            target = self.teacher(*inputs).sample if terms.blocks or terms.output else None
        with _outputs_of(self.student.blocks if terms.blocks else []) as ours:
            result = self.student(*inputs, **arguments)
        losses: dict[str, Tensor] = {}
        if attachment_of(self.student) is not None:
            losses = {name: value for name, value in method_losses(self.student).items() if value.requires_grad}
        if terms.blocks:
            losses["teacher"] = self._block_error(ours, theirs, self._grid(hidden_states))
        if target is not None and terms.output:
            pixels = [rearrange(image, "b c r k -> b (r k) c") for image in (result.sample, target)]
            losses["output"] = image_errors(*pixels)
        complete = None
        if terms.complete:
            with disabled(self.student):
                complete = self.student(*inputs, **arguments).sample
        return result, complete, losses

    def _grid(self, x: Tensor) -> Grid:
        """Return the student's token grid (rows, columns) for inputs x (B, C, rows, columns)."""
        patch = self.student.config.patch_size
        return x.shape[-2] // patch, x.shape[-1] // patch

    def _block_error(
        self, ours: Sequence[tuple[Tensor, Packing | None]], theirs: Sequence[tuple[Tensor, Any]], grid: Grid
    ) -> Tensor:
        """Return the normalised error of each block's tokens, mean over images and blocks.

        Args:
            ours: Outputs of the student's blocks: (B, N, D), or packed as (T, D) with the packing.
            theirs: Outputs of the teacher's blocks, (B, P, D) for P patches.
            grid: (rows, columns) of the student.
        """
        packing = ours[0][1]
        if packing is None:
            pairs = zip(ours, theirs, strict=True)
            return torch.stack([image_errors(own, target) for (own, _), (target, _) in pairs]).mean()
        # For each packed token, the row of its patch in the teacher's tokens (B * P, D), and its weight in a mean over
        # images.
        patches = theirs[0][0].shape[1]
        rows = packing.sample * patches + patch_of(packing.cell, grid, cells_per_patch_side(self.student))
        weights = 1.0 / torch.tensor(packing.lengths, dtype=torch.float32, device=rows.device)
        errors = []
        for (own, _), (target, _) in zip(ours, theirs, strict=True):
            targets = rearrange(target, "b p d -> (b p) d").index_select(0, rows)
            squares = (own.float() - targets.float()).square().mean(dim=1)
            scaled = (weights / image_variances(target) / len(weights)).index_select(0, packing.sample)
            errors.append((squares * scaled).sum())
        return torch.stack(errors).mean()


@contextmanager
def _outputs_of(blocks: Sequence[nn.Module] | nn.ModuleList) -> Iterator[list[tuple[Tensor, Any]]]:
    """Yield a list that collects the outputs of blocks called in the context, each with the packing of the call."""
    outputs: list[tuple[Tensor, Any]] = []

    def collect(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        outputs.append((out, args[2] if len(args) > 2 else None))

    handles = [block.register_forward_hook(collect) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
