"""Apply the phases of an upcycling run: freeze parts of the student, and draw the samples on the fixed plan.

A phase is a stretch of the run with its own losses, frozen parts and choice of kept tokens. The fixed plan keeps one
token per patch of the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokdyn import draws
from tokdyn.errors import RecipeError
from tokdyn.methods import WidthGates
from tokdyn.seeds import Draw, image_keys
from tokdyn.upcycling.conversion import EMBEDDERS
from tokdyn.upcycling.settings import Part, PhaseSettings, UpcycleSettings

_PREFIXES: dict[Part, tuple[str, ...]] = {
    "embedders": EMBEDDERS,
    "blocks": ("blocks.",),
    "router": ("chunking.router.",),
    "methods": ("tokdyn.",),
}


def part_of(name: str) -> Part:
    """Return the part of the student that the parameter of a name belongs to."""
    return next((part for part, prefixes in _PREFIXES.items() if name.startswith(prefixes)), "scaffold")


def always_frozen(settings: UpcycleSettings) -> frozenset[Part]:
    """Return the parts that are frozen in all phases."""
    return frozenset.intersection(*(frozenset(phase.frozen) for phase in settings.phases))


def freeze(model: nn.Module, parts: Iterable[Part]) -> None:
    """Freeze some parts of a student and make all others trainable, apart from the position table.

    Raises:
        RecipeError: No trainable parameter is left.
    """
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.requires_grad_(part_of(name) not in parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            f"upcycle.phases freezes {', '.join(sorted(parts))} in every phase, so nothing is trained; remove a part "
            "from the list frozen of a phase."
        )


def drop_frozen_gradients(model: nn.Module, phase: PhaseSettings) -> None:
    """Set the gradients of the parts that a phase freezes to None, so that the optimizer does not change them."""
    for name, parameter in model.named_parameters():
        if part_of(name) in phase.frozen:
            parameter.grad = None


def count_steps(model: nn.Module, step: int) -> None:
    """Set the counter of every warm-up of a method to the steps taken, however many calls of the model a step has."""
    for module in model.modules():
        if isinstance(module, WidthGates):
            module.calls.fill_(step)


@dataclass(frozen=True)
class PhaseBatch:
    """The phase that a micro-batch of B samples is in, and which of its samples keep the tokens of the fixed plan.

    Attributes:
        phase: The phase, with the weights of its losses.
        on_fixed_plan: (B,) bool, True for samples on the fixed plan. The others keep those that the router chooses.
    """

    phase: PhaseSettings
    on_fixed_plan: Tensor

    def weight(self, name: str) -> float:
        """Return the weight of the loss of a name; 1 for losses of attached methods, which are weighted already."""
        return float(getattr(self.phase, name, 1.0))

    @staticmethod
    def draw(settings: UpcycleSettings, seed: int, step: int, first: int, batch: int) -> PhaseBatch:
        """Draw the samples on the fixed plan: all, none, or during a handover a share that falls from 1 to 0.

        Whether a sample is drawn depends only on the seed, the step and the index of the sample.

        Args:
            settings: The section `upcycle` of the recipe.
            seed: The recipe's seed.
            step: Steps already taken.
            first: Index, within the step, of the first sample of the micro-batch.
            batch: Samples in the micro-batch.
        """
        phase, passed = settings.phase(step)
        share = {"fixed": 1.0, "learned": 0.0, "handover": 1.0 - passed}[phase.plan]
        if share in (0.0, 1.0):
            return PhaseBatch(phase, torch.full((batch,), bool(share)))
        drawn = draws.uniform(image_keys(seed, step, first, batch), 1, Draw.PLAN)[:, 0]
        return PhaseBatch(phase, drawn < share)
