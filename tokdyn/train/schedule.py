"""What changes with the step, each a pure function of it: learning rate, target, tail drop, EMA decay."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tokdyn.recipe import ChunkingSettings, OptimizerSettings, Recipe
from tokdyn.seeds import Stream, generator


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of a step.

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
    """Learning rate of a step of a run, times the factor of its upcycling phase.

    Args:
        recipe: The recipe.
        step: Steps already taken.
        steps: Steps of the whole run.
    """
    rate = learning_rate(recipe.optimizer, step, steps)
    return rate if recipe.upcycle is None else rate * recipe.upcycle.phase(step)[0].lr


def target(settings: ChunkingSettings, model_target: float, step: int) -> float:
    """N of a step: one of N tokens should be kept.

    Args:
        settings: The curriculum and how to move between its points.
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
    """Tail-drop fraction of a step (multi-budget training, arXiv 2603.06351 v2).

    Args:
        settings: The budgets, and the steps before the first draw.
        seed: The recipe's seed.
        step: Steps already taken.
        first: Number, within the step, of this micro-batch's first sample.
        batch: Samples in this micro-batch.

    Returns:
        0.0 during the warm-up; then one fraction that every device draws alike, or with `draw: sample` a (batch,)
        tensor of one per sample.
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
    """Decay of the averaged weights: min(decay, (1 + t) / (10 + t)), so that short runs forget their start.

    Args:
        decay: The final decay.
        warmup: Whether to rise to it.
        step: Steps already averaged, t.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
