"""Name the guidance branches that a call computes: one, or one in each of several equal parts of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Branch: TypeAlias = str | tuple[str, ...]
"""The name of the branch that all samples of a call belong to; or the names of the branches that equal parts of its
batch are, in order. Without a name in it, the call is about one branch that nobody has named."""

COND, UNCOND, PERTURBED = "cond", "uncond", "perturbed"
BOTH = "cond_uncond"  # what pipelines of diffusers call a batch that may hold both branches
_PREFIX = "pred_"  # guiders of diffusers name the predictions that they ask for
PERTURBING = frozenset({"skip_layers", "spatio_temporal_guidance_blocks", "isolate_modalities"})


def standard(name: str) -> str:
    """Return the standard name of a branch that code of diffusers has named: "cond" for "pred_cond"."""
    return name.removeprefix(_PREFIX)


def is_unconditional(name: str) -> bool:
    """Return whether a branch is the unconditional one; perturbed branches are conditional."""
    return name == UNCOND


def perturbs(arguments: Mapping[str, Any]) -> bool:
    """Return whether the arguments of a call let the model leave something out, as the weak prediction of guidance.

    Such are skip-layer guidance (SD3), spatio-temporal guidance and isolated modalities (LTX-2).
    """
    return not PERTURBING.isdisjoint(arguments) and any(arguments.get(name) for name in PERTURBING)


def split(batch: int, names: tuple[str, ...]) -> list[tuple[str, range]] | None:
    """Divide a batch of B samples into equal parts with these names; None if that is impossible."""
    if not names or batch % len(names):
        return None
    size = batch // len(names)
    return [(name, range(part * size, (part + 1) * size)) for part, name in enumerate(names)]
