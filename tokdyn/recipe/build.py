"""From a recipe to its model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokdyn.cost import compute_matched_steps, flops_per_image, model_parts
from tokdyn.data import DataConfig
from tokdyn.data.config import rows_and_columns
from tokdyn.errors import CheckpointError, InputError, RecipeError
from tokdyn.recipe.model_settings import FROM_ELSEWHERE, ModelSettings
from tokdyn.recipe.schema import Recipe
from tokdyn.upcycling.settings import UpcycleSettings

if TYPE_CHECKING:
    from tokdyn.methods import Method
    from tokdyn.models import DiT

Shape = tuple[int, int, int]
_LATENT_CHANNELS = 4  # of the VAEs that the published models were trained on
_SHAPES_SIZE = 32
_SHAPES_CLASSES = 10


def planned_shape(data: DataConfig) -> Shape:
    """Return (C, H, W) of the samples as far as the recipe says, without opening the data.

    Args:
        data: The data section. Latents without a size, and images without one, say too little.

    Raises:
        RecipeError: The recipe does not say how large the samples are.
    """
    size = data.size or (_SHAPES_SIZE if data.kind == "shapes" else None)
    if size is None:
        raise RecipeError(
            f"data.size is needed to plan without reading the {data.kind}; set data.size=32, for example."
        )
    channels = _LATENT_CHANNELS if data.kind == "latents" else data.channels
    return (channels, *rows_and_columns(size))


def model_arguments(recipe: Recipe, shape: Shape, num_classes: int) -> dict[str, Any]:
    """Return the constructor's arguments that a recipe fixes beyond the named size.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of the samples.
        num_classes: Labels, without the null class.
    """
    channels, rows, columns = shape
    own = {} if recipe.upcycle is not None else recipe.model.overrides  # those are of what the base becomes
    return {
        "sample_size": rows if rows == columns else (rows, columns),
        "in_channels": channels,
        "num_classes": num_classes,
        "learn_sigma": recipe.objective.learn_sigma,
        **own,
    }


def open_base(recipe: Recipe, shape: Shape, num_classes: int) -> DiT:
    """Read the pretrained model that an upcycling recipe begins with.

    Args:
        recipe: With a section `upcycle`.
        shape: (C, H, W) of the samples.
        num_classes: Labels, without the null class.

    Raises:
        CheckpointError: It cannot be read, or is no DiT.
        RecipeError: It was made for other samples, classes or another objective than the recipe's.
    """
    from tokdyn.bases import read_base

    assert recipe.upcycle is not None, "there is a base only in a recipe with a section upcycle"
    base = read_base(recipe.upcycle.base, ema=recipe.upcycle.ema)
    if base.objective != recipe.objective.kind:
        raise RecipeError(
            f"the base {base.origin} was trained with objective.kind={base.objective}, and the recipe has "
            f"{recipe.objective.kind}; make them equal."
        )
    return _fitting(base.model, recipe, shape, num_classes)


def planned_base(recipe: Recipe) -> DiT:
    """The base of an upcycling recipe without its weights, where it is a known one; else it is read."""
    from tokdyn.bases import rows

    assert recipe.upcycle is not None, "there is a base only in a recipe with a section upcycle"
    shape, classes = planned_shape(recipe.data), recipe.data.num_classes or _SHAPES_CLASSES
    row = None if Path(recipe.upcycle.base).exists() else rows().get(recipe.upcycle.base)
    if row is None:
        return open_base(recipe, shape, classes)
    with torch.device("meta"):
        return _fitting(row.build(), recipe, shape, classes)


def _fitting(base: Any, recipe: Recipe, shape: Shape, num_classes: int) -> DiT:
    """A base that the recipe can begin with."""
    from tokdyn.models import DiT

    assert recipe.upcycle is not None, "there is a base only in a recipe with a section upcycle"
    name = recipe.upcycle.base
    if not isinstance(base, DiT):
        raise CheckpointError(f"upcycle.base {name} is no DiT but a {type(base).__name__}; train that on as it is.")
    if hasattr(base, "tokdyn"):
        raise CheckpointError(
            f"upcycle.base {name} has methods of its own (DyDiT); begin with the DiT that it came from."
        )
    expected = model_arguments(recipe, shape, num_classes)
    free = {"out_channels"} | (
        {"learn_sigma"} if recipe.objective.kind == "flow" else set()
    )  # a flow ignores a second half
    for key, where in FROM_ELSEWHERE.items():
        there = base.config[key]
        if key not in free and (tuple(there) if isinstance(there, list) else there) != expected[key]:
            raise RecipeError(
                f"the base {name} has {key}={there}, and the recipe {expected[key]}; set {where} to what the base was "
                "trained with, or choose another base."
            )
    found: DiT = base
    return found


def _by_steps(method: Method, recipe: Recipe) -> Method:
    """The method with a warm-up in calls of the model: a recipe counts optimizer steps, each of several calls."""
    calls = getattr(method, "warmup", 0) * recipe.training.accumulation
    return method.model_copy(update={"warmup": calls}) if calls else method


def _check_after(settings: UpcycleSettings, model: Any) -> None:
    """Refuse, before anything is trained, a share of the FLOPs that skipping every block would not come down to."""
    from tokdyn.cost.blocks import PARTS

    parts = model_parts(model)
    least = sum(flops for name, flops in parts.items() if name not in PARTS) / sum(parts.values())
    for each in settings.after:
        if each.method == "skip" and each.flops is not None and each.flops < least:
            raise RecipeError(
                f"upcycle.after: skip cannot come down to {each.flops:g} of the FLOPs: {least:.3g} of them are spent "
                "outside of the blocks; ask for more."
            )


def build_model(
    recipe: Recipe,
    shape: Shape | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
    base: DiT | None = None,
) -> Any:
    """Build the recipe's model with fresh weights from torch's global generator.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of the samples; None takes what the recipe says.
        num_classes: Labels; None takes what the recipe says, or 10 for procedural shapes.
        device: Where to build it; "meta" takes no memory.
        base: What an upcycled model begins with; None reads it.
    """
    from tokdyn.models import DCDiT, DiT

    if num_classes is None:
        num_classes = recipe.data.num_classes or (_SHAPES_CLASSES if recipe.data.kind == "shapes" else None)
    if num_classes is None:
        raise RecipeError("data.num_classes is needed to plan without reading the data; set data.num_classes=1000.")
    shape = shape or planned_shape(recipe.data)
    if recipe.upcycle is not None:
        from tokdyn.attach.entry import wrap
        from tokdyn.upcycling.conversion import to_dc

        base = base or open_base(recipe, shape, num_classes)
        with torch.device(device):
            chunked = recipe.model.kind == "dcdit"
            model = to_dc(base, **recipe.model.overrides) if chunked else copy.deepcopy(base).train()
            methods = [_by_steps(each.build(), recipe) for each in recipe.upcycle.methods]
            _check_after(recipe.upcycle, model)
            return (wrap(model, methods) if methods else model).to(device)
    arguments = model_arguments(recipe, shape, num_classes)
    family: Any = {"dit": DiT, "dcdit": DCDiT}[recipe.model.kind]
    with torch.device(device):
        return family.named(recipe.model.name, **arguments)


def planned_steps(recipe: Recipe, shape: Shape | None = None, num_classes: int | None = None) -> int:
    """Return how many optimizer steps the run takes.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of the samples; None takes what the recipe says. Only `compute_match` needs it.
        num_classes: Labels; as for `shape`.

    Raises:
        RecipeError: The warm-up of a compute-matched run costs more than the baseline.
    """
    training, match = recipe.training, recipe.compute_match
    if training.steps is not None or training.images is not None:
        steps = training.steps or math.ceil((training.images or 0) / training.batch_size)
        fixed = sum(phase.steps or 0 for phase in recipe.upcycle.phases) if recipe.upcycle else 0
        if recipe.upcycle is not None and fixed >= steps:
            raise RecipeError(
                f"the phases before {recipe.upcycle.phases[-1].name!r} take {fixed} steps and the run has {steps}, so "
                "it never begins; shorten upcycle.phases or lengthen the run."
            )
        return steps
    if match is None or recipe.chunking is None:
        raise RecipeError("set training.images, training.steps or compute_match; the last is for a chunking model.")
    baseline = recipe.model_copy(update={"model": ModelSettings(kind="dit", name=match.baseline), "chunking": None})
    kept = match.kept or 1.0 / recipe.model.target
    model = build_model(recipe, shape, num_classes, "meta")
    reference = build_model(baseline, shape, num_classes, "meta")
    budgets = [flops_per_image(model, kept * (1.0 - drop)) for drop in recipe.chunking.tail_drops]
    try:
        return compute_matched_steps(
            match.steps,
            recipe.chunking.budget_warmup_steps,
            flops_per_image(reference),
            flops_per_image(model, kept),
            budgets,
        )
    except InputError as error:
        raise RecipeError(f"compute_match: {error}") from error
