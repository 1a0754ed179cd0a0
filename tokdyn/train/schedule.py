"""Compute the learning rate, N, the tail drop and the EMA decay of a training step, as functions of the step alone.

N is the target of a chunking model: one of N tokens should be kept.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tokdyn import draws
from tokdyn.recipe import ChunkingSettings, OptimizerSettings, Recipe
from tokdyn.seeds import Draw, Stream, generator, image_keys


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step, before the factor of an upcycling phase.

    Args:
        settings: Peak, warm-up and decay of the learning rate.
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
    """Return the learning rate of a step, multiplied in an upcycling run by the factor of the phase.

    Args:
        recipe: The recipe.
        step: Steps already taken.
        steps: Steps of the whole run.
    """
    rate = learning_rate(recipe.optimizer, step, steps)
    return rate if recipe.upcycle is None else rate * recipe.upcycle.phase(step)[0].lr


def target(settings: ChunkingSettings, model_target: float, step: int) -> float:
    """Return N in a step.

    Args:
        settings: The curriculum of N: its points (step, N) and the interpolation between them.
        model_target: N if the recipe has no curriculum.
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
    """Draw the tail drop of a micro-batch, the share of the kept tokens to drop (arXiv 2603.06351 v2, multi-budget).

    It is a function of the seed, the step and, with `draw: sample`, the number of the sample, so that it does not
    depend on the number of devices.

    Args:
        settings: The tail drops to draw from, and the number of steps before the first draw.
        seed: The recipe's seed.
        step: Steps already taken.
        first: Index, within the step, of the first sample of the micro-batch.
        batch: Samples in the micro-batch, B.

    Returns:
        0.0 during the warm-up; then one number for all samples of the step, or with `draw: sample` a tensor (B,).
    """
    drops = settings.tail_drops
    if step < settings.budget_warmup_steps or drops == (0.0,):
        return 0.0
    if settings.draw == "step":
        return drops[int(torch.randint(len(drops), (), generator=generator(seed, Stream.BUDGET, step)))]
    drawn = draws.integers(image_keys(seed, step, first, batch), 1, len(drops), Draw.TAIL_DROP)
    return torch.tensor(drops)[drawn[:, 0]]


def ema_decay(decay: float, warmup: bool, step: int) -> float:
    """Return the decay of the averaged weights in a step.

    With warm-up it is `min(decay, (1 + t) / (10 + t))`, so that the average of a short run forgets the initial weights.

    Args:
        decay: The final decay.
        warmup: Whether the decay rises to its final value.
        step: Updates already made, t.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay
