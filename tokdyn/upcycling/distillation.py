"""Distillation against the frozen base: its blocks' outputs, token for token, and what it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach.controls import losses as method_losses
from tokdyn.attach.entry import attachment_of, disabled
from tokdyn.errors import InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.tokens import Grid, Packing, cells


def stride(student: DCDiT) -> int:
    """Cells of a DC-DiT on a side of a patch of the base that its blocks come from.

    Raises:
        InputError: it does not come from a base.
    """
    scale = float(student.config.position_scale)
    if scale >= 1.0:
        raise InputError(
            "this DC-DiT was not made from a DiT: its position_scale is 1, so no cell is the corner of a patch."
        )
    return round(1.0 / scale)


def corner_plan(grid: Grid, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed plan of the first phase: keep the upper left cell of every patch of the base.

    Args:
        grid: (rows, columns) of the DC-DiT.
        step: cells on a side of a patch.
        device: of the result.

    Returns:
        (N,) bool, N cells. The kept tokens, in raster order, are those of the base.
    """
    corners = [torch.arange(size, device=device) % step == 0 for size in grid]
    return (corners[0][:, None] & corners[1]).reshape(cells(grid))


def patch_of(cell: Tensor, grid: Grid, step: int) -> Tensor:
    """The patch of the base that cells lie in: (T,) int64 cells of a grid to (T,) int64 places in raster order."""
    rows, columns = cell // grid[1], cell % grid[1]
    return (rows // step) * (grid[1] // step) + columns // step


def normalised_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over the teacher's variance.

    Args:
        student: (T, D).
        teacher: (T, D), without gradient.

    Returns:
        Scalar: mean (s - t)^2 / mean over channels of the variance of t over the T rows. 1 is what a student reaches
        that says the mean of every channel.
    """
    target = teacher.float()
    variance = (target - target.mean(dim=0)).square().mean().clamp(min=1e-12)  # `var` takes three times as long
    return (student.float() - target).square().mean() / variance


@dataclass(frozen=True)
class Asked:
    """What is computed beside the student's own prediction.

    Attributes:
        blocks: the error between the outputs of its blocks and those of the base's.
        output: the error between the predictions of both.
        complete: the prediction of the student with its methods off.
    """

    blocks: bool = False
    output: bool = False
    complete: bool = False


class Distillation(nn.Module):
    """A model beside the DiT that its blocks come from.

    The base is no submodule: it is not trained, saved or handed to other processes, and computes without gradients.

    Args:
        student: a `DCDiT` from `to_dc`, or a copy of the base; either may be wrapped.
        teacher: the base; None where nothing is compared.
    """

    def __init__(self, student: Any, teacher: DiT | None) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple, which hides it from torch
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    @property
    def teacher(self) -> DiT:
        """The base.

        Raises:
            InputError: there is none.
        """
        (teacher,) = self._teacher
        if teacher is None:
            raise InputError("there is no base to compare with; give one.")
        return teacher

    def forward(
        self,
        asked: Asked,
        planned: Tensor,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        tail_drop: float | Tensor = 0.0,
    ) -> tuple[Any, Tensor | None, dict[str, Tensor]]:
        """Run the student, and the base beside it if something is compared.

        Args:
            asked: what to compute.
            planned: (B,) bool, the samples that keep the fixed plan.
            hidden_states: (B, C, rows, columns).
            timestep: (B,).
            class_labels: (B,).
            tail_drop: of the student.

        Returns:
            What the student returns; the complete prediction, if asked for; and the losses "teacher" (mean over the
            blocks of the normalised error between a token and the base's token of the patch that it lies in), "output"
            (the same for predictions), and those of the student's methods.
        """
        inputs = (hidden_states, timestep, class_labels)
        more: dict[str, Any] = {}
        if isinstance(self.student, DCDiT):
            plan = planned[:, None] & corner_plan(self._grid(hidden_states), stride(self.student), hidden_states.device)
            more = {"tail_drop": tail_drop, "plan": plan}
        wanted: list[tuple[Tensor, Any]] = []
        said = None
        if asked.blocks or asked.output:
            with torch.inference_mode(), _outputs(self.teacher.blocks if asked.blocks else []) as wanted:
                said = self.teacher(*inputs).sample
        with _outputs(self.student.blocks if asked.blocks else []) as found:
            result = self.student(*inputs, **more)
        losses: dict[str, Tensor] = {}
        if attachment_of(self.student) is not None:
            losses |= {name: value for name, value in method_losses(self.student).items() if value.requires_grad}
        if asked.blocks:
            losses["teacher"] = self._compared(found, wanted, self._grid(hidden_states))
        if said is not None and asked.output:
            rows = [each.movedim(1, -1).reshape(-1, each.shape[1]) for each in (result.sample, said)]
            losses["output"] = normalised_mse(*rows)
        complete = None
        if asked.complete:
            with disabled(self.student):
                complete = self.student(*inputs, **more).sample
        return result, complete, losses

    def _grid(self, x: Tensor) -> Grid:
        patch = self.student.config.patch_size
        return x.shape[-2] // patch, x.shape[-1] // patch

    def _compared(
        self, found: Sequence[tuple[Tensor, Packing | None]], wanted: Sequence[tuple[Tensor, Any]], grid: Grid
    ) -> Tensor:
        """The mean over the blocks of what `normalised_mse` says."""
        packing = found[0][1]
        row = None
        if packing is not None:
            row = packing.sample * wanted[0][0].shape[1] + patch_of(packing.cell, grid, stride(self.student))
        errors = []
        for (mine, _), (theirs, _) in zip(found, wanted, strict=True):
            rows = theirs.reshape(-1, theirs.shape[-1])
            errors.append(
                normalised_mse(mine.reshape(-1, mine.shape[-1]), rows if row is None else rows.index_select(0, row))
            )
        return torch.stack(errors).mean()


@contextmanager
def _outputs(blocks: Sequence[nn.Module] | nn.ModuleList) -> Iterator[list[tuple[Tensor, Any]]]:
    """Within this context what the blocks return is collected, each with the packing that it was given."""
    found: list[tuple[Tensor, Any]] = []

    def collect(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found.append((out, args[2] if len(args) > 2 else None))

    handles = [block.register_forward_hook(collect) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
