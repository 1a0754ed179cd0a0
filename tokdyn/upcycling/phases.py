"""What a phase of an upcycling run changes in a step: the samples on the fixed plan and the parts that learn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokdyn.errors import RecipeError
from tokdyn.seeds import Stream, generator
from tokdyn.upcycling.conversion import EMBEDDERS
from tokdyn.upcycling.settings import Part, PhaseSettings, UpcycleSettings

_PREFIXES: dict[Part, tuple[str, ...]] = {
    "embedders": EMBEDDERS,
    "blocks": ("blocks.",),
    "router": ("chunking.router.",),
    "methods": ("tokdyn.",),
}


def part_of(name: str) -> Part:
    """Return the part of the student that a parameter belongs to, by the name of the parameter."""
    return next((part for part, prefixes in _PREFIXES.items() if name.startswith(prefixes)), "scaffold")


def always_frozen(settings: UpcycleSettings) -> frozenset[Part]:
    """Return the parts that learn in no phase."""
    return frozenset.intersection(*(frozenset(phase.frozen) for phase in settings.phases))


def freeze(model: nn.Module, parts: Iterable[Part]) -> None:
    """Let every parameter learn but those of some parts and the table of positions, which is never trained.

    Raises:
        RecipeError: No parameter is left to learn.
    """
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.requires_grad_(part_of(name) not in parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            f"upcycle.phases: {', '.join(sorted(parts))} are frozen in every phase, so nothing learns; take one off "
            "the list frozen of a phase."
        )


def drop_frozen_gradients(model: nn.Module, phase: PhaseSettings) -> None:
    """Set the gradients of the parts that a phase freezes to None, so that the optimizer does not move them."""
    for name, parameter in model.named_parameters():
        if part_of(name) in phase.frozen:
            parameter.grad = None


@dataclass(frozen=True)
class PhaseBatch:
    """The phase of a micro-batch, and which of its samples follow the fixed plan.

    Attributes:
        phase: The phase, with the weights of its losses.
        on_fixed_plan: (B,) bool. These samples keep the tokens of the fixed plan, the others those of the router.
    """

    phase: PhaseSettings
    on_fixed_plan: Tensor

    def weight(self, name: str) -> float:
        """Return the weight of a loss by its name; losses of attached methods are weighted already."""
        return float(getattr(self.phase, name, 1.0))

    @staticmethod
    def draw(settings: UpcycleSettings, seed: int, step: int, first: int, batch: int) -> PhaseBatch:
        """Draw the samples on the fixed plan, as a function of seed, step and sample.

        Args:
            settings: The section `upcycle` of the recipe.
            seed: The recipe's seed.
            step: Steps already taken.
            first: Number, within the step, of the first sample of the micro-batch.
            batch: Samples in the micro-batch.
        """
        phase, passed = settings.phase(step)
        share = {"fixed": 1.0, "learned": 0.0, "handover": 1.0 - passed}[phase.plan]
        if share in (0.0, 1.0):
            return PhaseBatch(phase, torch.full((batch,), bool(share)))
        drawn = [torch.rand((), generator=generator(seed, Stream.PLAN, step, first + i)) for i in range(batch)]
        return PhaseBatch(phase, torch.stack(drawn) < share)
