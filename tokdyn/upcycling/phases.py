"""What upcycling adds to a step: which samples follow the fixed plan, what is frozen, and the losses on the base."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokdyn.errors import RecipeError
from tokdyn.seeds import Stream, generator
from tokdyn.upcycling.conversion import EMBEDDERS
from tokdyn.upcycling.settings import Part, PhaseSettings, UpcycleSettings

_PARTS: dict[Part, tuple[str, ...]] = {
    "embedders": EMBEDDERS,
    "blocks": ("blocks.",),
    "router": ("chunking.router.",),
    "methods": ("tokdyn.",),
}


def part_of(name: str) -> Part:
    """The part of a model that a parameter belongs to, by its name."""
    return next((part for part, prefixes in _PARTS.items() if name.startswith(prefixes)), "scaffold")


def always_frozen(settings: UpcycleSettings) -> frozenset[Part]:
    """Parts that learn in no phase."""
    return frozenset.intersection(*(frozenset(phase.frozen) for phase in settings.phases))


def freeze(model: nn.Module, parts: Iterable[Part]) -> None:
    """Let everything learn but those parts and what is fixed by nature, such as the table of positions."""
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.requires_grad_(part_of(name) not in parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"nothing learns: {', '.join(sorted(parts))} are frozen in all phases; let one go.")


def hold(model: nn.Module, phase: PhaseSettings) -> None:
    """Drop the gradients of what a phase leaves alone, so that the optimizer passes it by."""
    for name, parameter in model.named_parameters():
        if part_of(name) in phase.frozen:
            parameter.grad = None


@dataclass(frozen=True)
class Guidance:
    """What a micro-step takes from the base.

    Attributes:
        phase: With the weights of the losses.
        planned: (B,) bool, samples that keep the tokens of the fixed plan.
    """

    phase: PhaseSettings
    planned: Tensor

    def weight(self, name: str) -> float:
        """Weight of a loss; those of methods have theirs in them."""
        return float(getattr(self.phase, name, 1.0))

    @staticmethod
    def at(settings: UpcycleSettings, seed: int, step: int, first: int, batch: int) -> Guidance:
        """The guidance of a micro-batch, a function of where it is in the run.

        Args:
            settings: The phases.
            seed: The recipe's seed.
            step: Steps already taken.
            first: Number, within the step, of the micro-batch's first sample.
            batch: Samples in it.
        """
        phase, passed = settings.phase(step)
        share = {"fixed": 1.0, "learned": 0.0, "handover": 1.0 - passed}[phase.plan]
        if share in (0.0, 1.0):
            return Guidance(phase, torch.full((batch,), bool(share)))
        drawn = [torch.rand((), generator=generator(seed, Stream.PLAN, step, first + i)) for i in range(batch)]
        return Guidance(phase, torch.stack(drawn) < share)
