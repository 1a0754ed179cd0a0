"""Distillation against the frozen base: its blocks' outputs, token for token, and what it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.models import DiT
from tokdyn.tokens import Grid, Packing
from tokdyn.upcycle.dc import corner_plan, patch_of, stride


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
    variance = target.var(dim=0, unbiased=False).mean().clamp(min=1e-12)
    return (student.float() - target).square().mean() / variance


class Distillation(nn.Module):
    """A DC-DiT beside the DiT that its blocks come from.

    The base is no submodule: it is not trained, saved or handed to other processes, and computes without gradients.

    Args:
        student: a `DCDiT` from `to_dc`, which may be wrapped.
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
        blocks: bool,
        output: bool,
        planned: Tensor,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        tail_drop: float | Tensor = 0.0,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the student, and the base beside it if something is compared.

        Args:
            blocks: compare the outputs of the blocks.
            output: compare the predictions.
            planned: (B,) bool, the samples that keep the fixed plan.
            hidden_states: (B, C, rows, columns).
            timestep: (B,).
            class_labels: (B,).
            tail_drop: of the student.

        Returns:
            What the student returns, and the losses "teacher" (mean over the blocks of the normalised error between a
            kept token and the base's token of the patch that its cell lies in) and "output" (the same for predictions).
        """
        patch = self.student.config.patch_size
        grid = hidden_states.shape[-2] // patch, hidden_states.shape[-1] // patch
        plan = planned[:, None] & corner_plan(grid, stride(self.student), hidden_states.device)
        more = {"tail_drop": tail_drop, "plan": plan}
        if not (blocks or output):
            return self.student(hidden_states, timestep, class_labels, **more), {}
        with torch.no_grad(), _outputs(self.teacher.blocks if blocks else []) as wanted:
            said = self.teacher(hidden_states, timestep, class_labels).sample
        with _outputs(self.student.blocks if blocks else []) as found:
            result = self.student(hidden_states, timestep, class_labels, **more)
        losses = {}
        if blocks:
            losses["teacher"] = self._compared(found, wanted, grid)
        if output:
            rows = [each.movedim(1, -1).reshape(-1, each.shape[1]) for each in (result.sample, said)]
            losses["output"] = normalised_mse(*rows)
        return result, losses

    def _compared(
        self, found: Sequence[tuple[Tensor, Packing | None]], wanted: Sequence[tuple[Tensor, Any]], grid: Grid
    ) -> Tensor:
        """The mean over the blocks of what `normalised_mse` says."""
        packing = found[0][1]
        assert packing is not None, "blocks of a DC-DiT get packed rows"
        place = patch_of(packing.cell, grid, stride(self.student))
        row = packing.sample * wanted[0][0].shape[1] + place
        errors = [
            normalised_mse(mine, theirs.reshape(-1, theirs.shape[-1]).index_select(0, row))
            for (mine, _), (theirs, _) in zip(found, wanted, strict=True)
        ]
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
