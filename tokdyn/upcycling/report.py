"""What an upcycled model took from its base, what is new and what is frozen, and what both cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tokdyn.attach import attachment_of
from tokdyn.cost import flops_per_image
from tokdyn.errors import InputError
from tokdyn.methods import DynamicWidth
from tokdyn.models import DCDiT, DiT
from tokdyn.tokens import cells

_FIXED = "pos_embed"


@dataclass(frozen=True)
class Tensors:
    """Some tensors of a model.

    Attributes:
        names: of each.
        parameters: numbers in them together.
    """

    names: tuple[str, ...]
    parameters: int

    def __str__(self) -> str:
        return f"{len(self.names):,} tensors, {self.parameters:,} parameters"


@dataclass(frozen=True)
class UpcycleReport:
    """What became of a base.

    Attributes:
        copied: tensors that are equal to those of the base by the same name.
        new: all others, but for the fixed table of positions.
        frozen: tensors that do not learn in any phase.
        left_behind: tensors of the base that have no equal there: its patch embedding and its head.
        tokens_before: tokens of an image in the blocks of the base.
        tokens_after: the same of the new model on average, as far as its router keeps what it aims at, or None if it
            has none.
        flops_before: FLOPs of one forward of the base on one image; a multiply-add is 2 FLOPs.
        flops_after: the same of the new model, keeping what it aims at, at full width.
        width: share of the blocks' FLOPs that DynamicWidth on the new model is trained down to; None without it.
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
        """Say it in (what, how much) pairs with units."""
        ratio = self.flops_after / self.flops_before
        return [
            ("copied", str(self.copied)),
            ("new", f"{self.new} ({self._parts(self.new)})"),
            ("frozen", f"{self.frozen} ({self._parts(self.frozen)})" if self.frozen.names else "nothing"),
            (
                "left behind",
                f"{self.left_behind} ({self._parts(self.left_behind)})" if self.left_behind.names else "nothing",
            ),
            (
                "tokens",
                f"{self.tokens_before:,} per image before, {self.tokens_after:,.0f} expected in the blocks after",
            ),
            (
                "forward",
                f"{self.flops_before / 1e9:,.2f} GFLOP per image before, {self.flops_after / 1e9:,.2f} after "
                f"({ratio:.2f}x, multiply-add = 2){self._narrowed()}",
            ),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The same in lists and numbers, as JSON takes it."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(f"{what:<12} {text}" for what, text in self.lines())

    def _narrowed(self) -> str:
        return "" if self.width is None else f"; DynamicWidth is trained to {self.width:.0%} of its blocks'"

    @staticmethod
    def _parts(tensors: Tensors) -> str:
        return ", ".join(dict.fromkeys(name.partition(".")[0] for name in tensors.names))


def report(base: DiT, student: Any) -> UpcycleReport:
    """Compare a new model with the base that it was made from, before either has learned anything.

    Args:
        base: the pretrained model.
        student: from `tokdyn.upcycle`.

    Raises:
        InputError: the base is no `DiT`.
    """
    if not (isinstance(base, DiT) and isinstance(student, DiT | DCDiT)):
        raise InputError(f"a report compares a DiT with what was made of it, not a {type(base).__name__}.")
    before, after = dict(base.state_dict()), dict(student.state_dict())
    equal = [name for name in after if name in before and _equal(before[name], after[name])]
    new = [name for name in after if name not in equal and name != _FIXED]
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    frozen = [name for name in after if name not in learning and name != _FIXED]
    chunked = isinstance(student, DCDiT)
    attachment = attachment_of(student)
    carried = () if attachment is None else attachment.methods
    grid = student._grid_of(student.config.sample_size)
    return UpcycleReport(
        copied=_tensors([name for name in equal if name != _FIXED], after),
        new=_tensors(new, after),
        frozen=_tensors(frozen, after),
        left_behind=_tensors([name for name in before if name not in equal and name != _FIXED], before),
        tokens_before=cells(base._grid_of(base.config.sample_size)),
        tokens_after=cells(grid) / (student.config.target if chunked else 1.0),
        flops_before=flops_per_image(base),
        flops_after=flops_per_image(student),
        width=next((each.target for each in carried if isinstance(each, DynamicWidth)), None),
    )


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other), other)


def _tensors(names: Sequence[str], values: dict[str, torch.Tensor]) -> Tensors:
    return Tensors(tuple(names), sum(values[name].numel() for name in names))
