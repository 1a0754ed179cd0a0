"""Learning rate, target, tail drop and EMA decay, each as a pure function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tokdyn.recipe import ChunkingSettings, OptimizerSettings, Recipe
from tokdyn.seeds import Stream, generator


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        settings: Peak, warm-up and decay.
        step: Steps already taken.
        steps: Steps of the whole run.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.decay == "none":
        return settings.lr
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    left = 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr + (1.0 - settings.final_lr) * left)


def run_learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of a step of a run, with the factor of its upcycling phase.

    Args:
        recipe: The recipe.
        step: Steps already taken.
        steps: Steps of the whole run.
    """
    rate = learning_rate(recipe.optimizer, step, steps)
    return rate if recipe.upcycle is None else rate * recipe.upcycle.phase(step)[0].lr


def target(settings: ChunkingSettings, model_target: float, step: int) -> float:
    """Return N of a step: one of N tokens should be kept.

    Args:
        settings: The curriculum, and how N moves between its points.
        model_target: N without a curriculum.
        step: Steps already taken.
    """
    points = settings.curriculum
    if not points:
        return model_target
    if step <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in pairwise(points):
        if step < end:
            share = (step - start) / (end - start) if settings.interpolation == "linear" else 0.0
            return low + (high - low) * share
    return points[-1][1]


def tail_drop(settings: ChunkingSettings, seed: int, step: int, first: int, batch: int) -> float | Tensor:
    """Draw the tail-drop fraction of a step (multi-budget training, arXiv 2603.06351 v2).

    Args:
        settings: The fractions to draw from, and the steps before the first draw.
        seed: The recipe's seed.
        step: Steps already taken.
        first: Number, within the step, of the first sample of the micro-batch.
        batch: Samples in the micro-batch.

    Returns:
        0.0 during the warm-up; then one fraction, the same on every device, or with `draw: sample` a (batch,) tensor.
    """
    budgets = settings.tail_drops
    if step < settings.budget_warmup_steps or budgets == (0.0,):
        return 0.0
    if settings.draw == "step":
        return budgets[int(torch.randint(len(budgets), (), generator=generator(seed, Stream.BUDGET, step)))]
    drawn = torch.stack(
        [
            torch.randint(len(budgets), (), generator=generator(seed, Stream.BUDGET, step, first + i))
            for i in range(batch)
        ]
    )
    return torch.tensor(budgets)[drawn]


def ema_decay(decay: float, warmup: bool, step: int) -> float:
    """Return the decay of the averaged weights: min(decay, (1 + t) / (10 + t)), so that short runs forget their start.

    Args:
        decay: The final decay.
        warmup: Whether the decay rises to it.
        step: Updates already made, t.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
