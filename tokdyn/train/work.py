"""Work out what a training step of a recipe takes on each of many GPUs, without computing or allocating anything."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokdyn.cost import model_parts
from tokdyn.diffusion.objective import Noised
from tokdyn.errors import RecipeError
from tokdyn.ops.pack import pack_index
from tokdyn.recipe import Recipe
from tokdyn.recipe.build import Shape, build_model
from tokdyn.scaling.rehearsal import held, most_alive, twin_of, without_values
from tokdyn.scaling.work import Work, weights_of
from tokdyn.tokens import Packing, cells
from tokdyn.train.setup import micro_batch_size
from tokdyn.train.step import Draws, RatioTerm, micro_step

_BLOCK_PARTS = ("adaLN", "projections", "attention", "mlp")
_REHEARSED = (1, 2)  # numbers of blocks; what is alive grows by the same with every further block


def work_of(recipe: Recipe, gpus: int, shape: Shape, classes: int | None, steps: int) -> Work:
    """Work out what a training step takes on each of some GPUs.

    A DC-DiT keeps as many tokens as `kept_shares` says: its FLOPs are means over the tail drops of the recipe, its
    memory that without tail drop, which is the most.

    Args:
        recipe: The recipe of a run from scratch.
        gpus: Number of GPUs.
        shape: (C, H, W) of an image.
        classes: Number of classes; None takes the recipe's.
        steps: Optimizer steps of the run.

    Raises:
        RecipeError: The batch does not divide over the GPUs, or the recipe upcycles a model.
    """
    require_scratch(recipe)
    micro_batch = micro_batch_size(recipe, gpus)
    model = build_model(recipe, shape, classes, "meta")
    trained = [each for each in model.parameters() if each.requires_grad]
    units, root = weights_of(model, list(model.blocks), trained)
    shares: list[float | None] = [*kept_shares(recipe)] if recipe.chunking else [None]
    flops, recomputed = 0.0, 0.0
    for share in shares:
        parts = model_parts(model, share, device="cuda")  # on a GPU, which computes de-chunking by products
        flops += sum(parts.values()) / len(shares)
        recomputed += sum(parts[part] for part in _BLOCK_PARTS) / len(shares)
    return Work(
        of="images",
        batch=recipe.training.batch_size,
        micro_batch=micro_batch,
        accumulation=recipe.training.accumulation,
        steps=steps,
        precision=recipe.training.precision,
        flops=3.0 * flops + (recomputed if recipe.training.gradient_checkpointing else 0.0),
        units=units,
        root=root,
        averaged=True,
        beside=0,
        activations=activations(recipe, model, micro_batch, shape, shares[0]),
    )


def require_scratch(recipe: Recipe) -> None:
    """Raise a RecipeError if a recipe upcycles a model, whose phases are not worked out for many GPUs."""
    if recipe.upcycle is not None:
        raise RecipeError(
            "gpus is for recipes that train from scratch and for pipelines, and this recipe has a section upcycle; "
            "leave gpus out."
        )


def kept_shares(recipe: Recipe) -> list[float]:
    """Return the kept share under each tail drop that training of a chunking model draws, the largest first.

    Before tail drop it is assumed to be compute_match.kept, or 1/N if the recipe has no such setting.
    """
    assumed = recipe.compute_match.kept if recipe.compute_match else None
    kept = assumed or 1.0 / recipe.model.target
    drops = recipe.chunking.tail_drops if recipe.chunking else (0.0,)
    return [kept * (1.0 - drop) for drop in sorted(drops)]


def activations(recipe: Recipe, model: Any, micro_batch: int, shape: Shape, kept: float | None) -> int:
    """Return the most bytes that live at a time in a micro-batch, beside weights and gradients.

    The step is rehearsed with one and with two of the blocks, and all further ones are taken to add the same.

    Args:
        recipe: The recipe.
        model: Its model on the meta device; only its blocks are exchanged meanwhile.
        micro_batch: Images.
        shape: (C, H, W) of an image.
        kept: Share of the tokens that the blocks compute; None for all.
    """
    blocks, most = model.blocks, []
    try:
        for count in _REHEARSED[: len(blocks)]:
            model.blocks = blocks[:count]
            most.append(_rehearsed(recipe, model, micro_batch, shape, kept))
    finally:
        model.blocks = blocks
    return most[-1] + (len(blocks) - len(most)) * (most[-1] - most[0])


def _rehearsed(recipe: Recipe, model: Any, micro_batch: int, shape: Shape, kept: float | None) -> int:
    """Rehearse a micro-batch with the blocks that the model has, and return the most bytes that live at a time."""
    kind = torch.int64 if recipe.objective.kind == "noise" else torch.float32
    recipe.objective.level(torch.zeros(1, dtype=kind))  # tables of noise, which are kept for the process, need values
    fake = without_values()
    twin: Any = twin_of(model, fake, {}).train()
    if recipe.training.gradient_checkpointing:
        twin.enable_gradient_checkpointing()
    with fake:
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        x_t, noise, x0 = images = [torch.empty(micro_batch, *shape) for _ in range(3)]
        labels = torch.empty(micro_batch, dtype=torch.int64)
        noised = Noised(x_t, torch.empty(micro_batch, dtype=kind), noise, x0, torch.empty(micro_batch))
    chunking = None
    if kept is not None and recipe.chunking is not None:
        grid = tuple(size // model.config.patch_size for size in shape[1:])
        count = max(1, round(kept * cells(grid)))
        # which tokens are kept has values, so it is decided here and not by the router
        packing = pack_index(torch.arange(count).expand(micro_batch, count), (count,) * micro_batch, grid)
        twin.chunking.chunk = partial(_chunk, packing)
        chunking = RatioTerm(recipe.model.target, recipe.chunking.ratio_weight, recipe.chunking.ratio_group)
    draws = Draws(noised, labels, 0.0)

    def step() -> None:
        torch.autograd.backward(micro_step(twin, recipe.objective, draws, recipe.training.precision, chunking).loss)

    gradients = [each.grad for each in twin.parameters()]
    return most_alive(step, fake, [held(twin), gradients, images, labels])


def _chunk(packing: Packing, tokens: Tensor, _: object) -> tuple[Tensor, Packing]:
    """Take the rows of a packing from dense tokens, as `ChunkingModule.chunk` does for those that a router keeps."""
    return tokens.reshape(-1, tokens.shape[-1]).index_select(0, packing.index), packing
