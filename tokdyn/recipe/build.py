"""Build the model of a recipe, read the base of an upcycling recipe, and compute the number of steps of the run.

A base is the pretrained DiT that upcycling starts from.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from tokdyn.bases import read_base, rows
from tokdyn.cost import compute_matched_steps, flops_per_image
from tokdyn.data import DataConfig
from tokdyn.data.config import rows_and_columns
from tokdyn.errors import CheckpointError, InputError, RecipeError
from tokdyn.host import memory
from tokdyn.models import DCDiT, DiT
from tokdyn.recipe.model_settings import DERIVED, ModelSettings
from tokdyn.recipe.schema import Recipe
from tokdyn.upcycling.conversion import build_student

Shape = tuple[int, int, int]
_LATENT_CHANNELS = 4  # of the VAEs that the published models were trained on
_SHAPES_SIZE = 32
_SHAPES_CLASSES = 10
_FLOAT = 4  # bytes


def stated_shape(data: DataConfig) -> Shape:
    """Return (C, H, W) of the samples as the section `data` of a recipe states it, without opening the data.

    Raises:
        RecipeError: The section does not set a size, and the data are not procedural shapes.
    """
    size = data.size or (_SHAPES_SIZE if data.kind == "shapes" else None)
    if size is None:
        raise RecipeError(f"data.size is needed if the {data.kind} are not opened; set data.size=32, for example.")
    channels = _LATENT_CHANNELS if data.kind == "latents" else data.channels
    return (channels, *rows_and_columns(size))


def model_arguments(recipe: Recipe, shape: Shape, num_classes: int) -> dict[str, Any]:
    """Return the arguments of the model's constructor that a recipe sets beside the named size.

    For an upcycling recipe, they are those that its base must have.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of the samples.
        num_classes: Number of classes, without the null class.
    """
    channels, rows, columns = shape
    # overrides of an upcycling recipe are settings of the student, not of the base
    overrides = {} if recipe.upcycle is not None else recipe.model.overrides
    return {
        "sample_size": rows if rows == columns else (rows, columns),
        "in_channels": channels,
        "num_classes": num_classes,
        "learn_sigma": recipe.objective.learn_sigma,
        **overrides,
    }


def open_base(recipe: Recipe, shape: Shape, num_classes: int) -> DiT:
    """Read the pretrained model that an upcycling recipe starts from.

    Args:
        recipe: A recipe with a section `upcycle`.
        shape: (C, H, W) of the samples.
        num_classes: Number of classes, without the null class.

    Raises:
        CheckpointError: The base cannot be read, or is not a plain DiT.
        RecipeError: The base was made for other samples, classes or another objective than the recipe's.
    """
    assert recipe.upcycle is not None, "only a recipe with a section upcycle has a base"
    base = read_base(recipe.upcycle.base, ema=recipe.upcycle.ema)
    if base.objective != recipe.objective.kind:
        raise RecipeError(
            f"the base {base.origin} was trained with objective.kind={base.objective}, and the recipe has "
            f"{recipe.objective.kind}; make them equal."
        )
    return _require_fit(base.model, recipe, shape, num_classes)


def base_without_weights(recipe: Recipe) -> DiT:
    """Return the base of an upcycling recipe to check the recipe with.

    If the base is one that `tokdyn models` lists, it is built on the meta device and not downloaded; otherwise it is
    read.

    Raises:
        TokdynError: As `open_base`.
    """
    assert recipe.upcycle is not None, "only a recipe with a section upcycle has a base"
    shape, classes = stated_shape(recipe.data), recipe.data.num_classes or _SHAPES_CLASSES
    row = None if Path(recipe.upcycle.base).exists() else rows().get(recipe.upcycle.base)
    if row is None:
        return open_base(recipe, shape, classes)
    with torch.device("meta"):
        return _require_fit(row.build(), recipe, shape, classes)


def _require_fit(base: Any, recipe: Recipe, shape: Shape, num_classes: int) -> DiT:
    """Return the base; raise a CheckpointError or RecipeError if the recipe cannot start from it."""
    assert recipe.upcycle is not None, "only a recipe with a section upcycle has a base"
    name = recipe.upcycle.base
    if not isinstance(base, DiT):
        raise CheckpointError(
            f"upcycle.base {name} is a {type(base).__name__}, expected a DiT; continue the training of a DC-DiT with "
            "tokdyn train instead."
        )
    if hasattr(base, "tokdyn"):
        raise CheckpointError(
            f"upcycle.base {name} has methods attached (DyDiT); start from the DiT that it was made from."
        )
    expected = model_arguments(recipe, shape, num_classes)
    ignored = {"out_channels"}
    if recipe.objective.kind == "flow":
        ignored.add("learn_sigma")  # a flow uses the first half of the output and ignores the second
    for key, setting in DERIVED.items():
        value = base.config[key]
        if key not in ignored and (tuple(value) if isinstance(value, list) else value) != expected[key]:
            raise RecipeError(
                f"the base {name} has {key}={value}, and the recipe {expected[key]}; set {setting} to what the base "
                "was trained with, or choose another base."
            )
    fitting: DiT = base
    return fitting


def build_model(
    recipe: Recipe,
    shape: Shape | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
    base: DiT | None = None,
) -> Any:
    """Build the recipe's model, with new weights drawn from torch's global generator.

    The model of an upcycling recipe gets its weights from the base.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of the samples; None takes the shape that the recipe states.
        num_classes: Number of classes; None takes the recipe's, or 10 for procedural shapes.
        device: Device to build the model on; "meta" takes no memory.
        base: The base of an upcycling recipe; None reads it.

    Returns:
        A DiT or a DCDiT, for an upcycling recipe with its methods attached.

    Raises:
        RecipeError: The shape or the number of classes is not given and the recipe does not state it.
        TokdynError: The model cannot be built, or the base cannot be read.
    """
    if num_classes is None:
        num_classes = recipe.data.num_classes or (_SHAPES_CLASSES if recipe.data.kind == "shapes" else None)
    if num_classes is None:
        raise RecipeError(
            "data.num_classes is needed if the data are not opened; set data.num_classes=1000, for example."
        )
    shape = shape or stated_shape(recipe.data)
    if recipe.upcycle is not None:
        base = base or open_base(recipe, shape, num_classes)
        chunked = recipe.model.kind == "dcdit"
        with torch.device(device):
            student = build_student(recipe.upcycle, base, chunked, **recipe.model.overrides)
            _require_cells(student, recipe, shape)
            return student.to(device)
    if torch.device(device).type != "meta":
        _require_memory(recipe, shape)
    family: Any = {"dit": DiT, "dcdit": DCDiT}[recipe.model.kind]
    with torch.device(device):
        model = family.named(recipe.model.name, **model_arguments(recipe, shape, num_classes))
    _require_cells(model, recipe, shape)
    return model


def _require_cells(model: Any, recipe: Recipe, shape: Shape) -> None:
    """Raise a RecipeError if the router should keep less than one of an image's cells."""
    if not isinstance(model, DCDiT):
        return
    cells = math.prod(shape[1:]) // model.config.patch_size**2
    points = () if recipe.chunking is None else recipe.chunking.curriculum
    for name, target in [("model.target", model.config.target), *(("chunking.curriculum", each) for _, each in points)]:
        if target > cells:
            raise RecipeError(
                f"{name} asks the router to keep one of {target:,.10g} cells, and an image has {cells:,}; choose a "
                f"number between 1 and {cells:,}."
            )


def _require_memory(recipe: Recipe, shape: Shape) -> None:
    """Raise a RecipeError if the weights, or the images of a micro-batch, take more memory than this machine has."""
    available = memory()
    if available is None:
        return
    rows = max(1, recipe.training.batch_size // (recipe.training.accumulation * int(os.environ.get("WORLD_SIZE", "1"))))
    needs = {
        "the weights of the model; choose a smaller model": recipe.model.parameters,
        f"a micro-batch of {rows:,} images; lower training.batch_size or raise training.accumulation": rows
        * math.prod(shape),
    }
    for what, count in needs.items():
        if _FLOAT * count > available:
            raise RecipeError(
                f"{_FLOAT * count / 2**30:,.0f} GiB would be needed for {what}. This machine has "
                f"{available / 2**30:,.0f} GiB."
            )


def total_steps(recipe: Recipe, shape: Shape | None = None, num_classes: int | None = None) -> int:
    """Return the number of optimizer steps of a run.

    Args:
        recipe: The recipe.
        shape: (C, H, W) of the samples, used for `compute_match` only; None takes the shape that the recipe states.
        num_classes: Number of classes, used for `compute_match` only; None takes the recipe's.

    Raises:
        RecipeError: The warm-up of a compute-matched run costs more than the baseline, or an upcycling run ends before
            its last phase starts.
    """
    training, match = recipe.training, recipe.compute_match
    if training.steps is not None or training.images is not None:
        steps = training.steps or math.ceil((training.images or 0) / training.batch_size)
        earlier = sum(phase.steps or 0 for phase in recipe.upcycle.phases) if recipe.upcycle else 0
        if recipe.upcycle is not None and earlier >= steps:
            raise RecipeError(
                f"the phases before {recipe.upcycle.phases[-1].name!r} take {earlier} steps and the run has {steps}, "
                "so this last phase never starts; shorten upcycle.phases or lengthen the run."
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
