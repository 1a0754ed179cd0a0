"""Report what a student copied from its base, what is new, what is frozen, and what both cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokdyn.attach import attachment_of
from tokdyn.cost import flops_per_image
from tokdyn.errors import InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.tokens import cells

_POSITIONS = "pos_embed"  # a fixed table that the report leaves out


@dataclass(frozen=True)
class Tensors:
    """A set of a model's tensors.

    Attributes:
        names: Their names.
        parameters: Their elements, all together.
    """

    names: tuple[str, ...]
    parameters: int

    def __str__(self) -> str:
        return f"{len(self.names):,} tensors, {self.parameters:,} parameters"

    @property
    def _modules(self) -> str:
        return ", ".join(dict.fromkeys(name.partition(".")[0] for name in self.names))

    def described(self) -> str:
        """Return the counts with the top-level modules that the tensors belong to."""
        return f"{self} ({self._modules})" if self.names else "nothing"


@dataclass(frozen=True)
class UpcycleReport:
    """A student beside its base, without the fixed table of positions.

    Attributes:
        copied: Tensors of the student that equal those of the base by the same name.
        new: All other tensors of the student.
        frozen: Tensors of the student that learn in no phase.
        left_behind: Tensors of the base that the student did not copy: its patch embedding and its head.
        tokens_before: Tokens per image in the blocks of the base.
        tokens_after: Tokens per image in the blocks of the student, on average, if its router meets its target.
        flops_before: FLOPs of one forward of the base on one image; a multiply-add is 2 FLOPs.
        flops_after: FLOPs of one forward of the student on one image, if its router meets its target, at full width.
        width: Share of the FLOPs of the blocks that an attached method is trained to; None without one.
    """

    copied: Tensors
    new: Tensors
    frozen: Tensors
    left_behind: Tensors
    tokens_before: int
    tokens_after: float
    flops_before: float
    flops_after: float
    width: float | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Return the report as (name, value with unit) pairs."""
        ratio = self.flops_after / self.flops_before
        narrowed = "" if self.width is None else f"; attached methods are trained to {self.width:.0%} of its blocks'"
        return [
            ("copied", str(self.copied)),
            ("new", self.new.described()),
            ("frozen", self.frozen.described()),
            ("left behind", self.left_behind.described()),
            (
                "tokens",
                f"{self.tokens_before:,} per image before, {self.tokens_after:,.0f} expected in the blocks after",
            ),
            (
                "forward",
                f"{self.flops_before / 1e9:,.2f} GFLOP per image before, {self.flops_after / 1e9:,.2f} after "
                f"({ratio:.2f}x, multiply-add = 2){narrowed}",
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as lists and numbers for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(f"{name:<12} {value}" for name, value in self.lines())


def report(base: DiT, student: Any) -> UpcycleReport:
    """Compare a student with its base, before either has been trained further.

    Args:
        base: The pretrained model.
        student: What `tokdyn.upcycle` made of it.

    Raises:
        InputError: The base is not a `DiT`, or the student neither a `DiT` nor a `DCDiT`.
    """
    if not (isinstance(base, DiT) and isinstance(student, DiT | DCDiT)):
        raise InputError(
            f"a report compares a DiT with the DiT or DCDiT made from it, not a {type(base).__name__} with a "
            f"{type(student).__name__}."
        )
    before, after = dict(base.state_dict()), dict(student.state_dict())
    equal = {name for name in after if name in before and _equal(before[name], after[name])} | {_POSITIONS}
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad} | {_POSITIONS}
    chunked = isinstance(student, DCDiT)
    attachment = attachment_of(student)
    methods = () if attachment is None else attachment.methods
    traits = [method.traits(student.config.depth) for method in methods]
    grid = student._grid_of(student.config.sample_size)
    return UpcycleReport(
        copied=_tensors([name for name in after if name in equal - {_POSITIONS}], after),
        new=_tensors([name for name in after if name not in equal], after),
        frozen=_tensors([name for name in after if name not in learning], after),
        left_behind=_tensors([name for name in before if name not in equal], before),
        tokens_before=cells(base._grid_of(base.config.sample_size)),
        tokens_after=cells(grid) / (student.config.target if chunked else 1.0),
        flops_before=flops_per_image(base),
        flops_after=flops_per_image(student),
        width=next((each.target for each in traits if each.learns == "FLOPs"), None),
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _tensors(names: Sequence[str], values: dict[str, torch.Tensor]) -> Tensors:
    return Tensors(tuple(names), sum(values[name].numel() for name in names))
