"""Measure how the length of the blocks' effect changes from step to step: MagCache's ratios (arXiv 2506.09045).

The ratio of step t is the mean over tokens of `|r_t|_2 / |r_(t-1)|_2`, where r is the output of the blocks minus their
input. It hardly depends on the prompt, so it is measured on few images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.trace.trajectory import Position

_ROUNDED = 5  # digits of a ratio, as published ones have


def magnitude_ratio(now: Tensor, before: Tensor) -> Tensor:
    """Compute the mean over tokens of `|now|_2 / |before|_2` for each sample.

    Args:
        now: (B, N, D) effect of the blocks.
        before: the shape of now, from the step before; tokens whose effect was zero are left out.

    Returns:
        (B,) fp32; 1 where all effects before are zero.
    """
    lengths, earlier = now.float().norm(dim=-1), before.float().norm(dim=-1)
    known = earlier > 0
    ratios = torch.where(known, lengths / torch.where(known, earlier, 1.0), 0.0)
    count = known.sum(dim=1)
    return torch.where(count > 0, ratios.sum(dim=1) / count.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Ratios:
    """The ratios of a run, and how much they differ.

    Attributes:
        mean: one per step, over images and branches; the first is 1.
        branches: the same for each guidance branch, by its name or place.
        deviation: largest standard deviation over images in a step of a branch.
        difference: largest difference between branches in a step.
    """

    mean: tuple[float, ...]
    branches: dict[str, tuple[float, ...]]
    deviation: float
    difference: float


def ratios_of(measured: Sequence[tuple[Position, Tensor | None]]) -> Ratios:
    """Average recorded ratios by step.

    Args:
        measured: for each call its position and its (B,) ratios, None in a first step.

    Raises:
        InputError: the runs differ in their number of steps.
    """
    values: dict[str, dict[int, list[float]]] = {}
    lengths: dict[Any, int] = {}
    for position, ratio in measured:
        own = values.setdefault(str(position.label), {})
        for sample, step in enumerate(position.steps):
            key = position.trajectory, position.branch, sample
            lengths[key] = max(lengths.get(key, 0), step + 1)
            if ratio is not None:
                own.setdefault(step, []).append(float(ratio[sample]))
    counts = sorted(set(lengths.values()))
    if len(counts) > 1:
        raise InputError(f"the recorded runs have {counts[0]} and {counts[-1]} steps; record runs of equal length.")
    steps = range(1, counts[0])
    tables = {name: [torch.tensor(own[step], dtype=torch.float64) for step in steps] for name, own in values.items()}
    branches = {name: _rounded([float(each.mean()) for each in table]) for name, table in tables.items()}
    columns = list(zip(*tables.values(), strict=True))
    return Ratios(
        _rounded([float(torch.cat(column).mean()) for column in columns]),
        branches,
        max((float(each.std(correction=0)) for column in columns for each in column), default=0.0),
        max((max(step) - min(step) for step in zip(*branches.values(), strict=True)), default=0.0),
    )


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return (1.0, *(round(value, _ROUNDED) for value in values))


def reused_steps(method: FeatureCache, count: int) -> list[bool]:
    """Return for each step of a run whether MagCache reuses it: the same ones in every run of this length.

    Args:
        method: a cache with rule="magcache" and as many ratios as there are steps.
        count: number of steps.
    """
    assert method.ratios is not None
    window, product, error, row, decided = method.window(count), 1.0, 0.0, 0, []
    for step, ratio in enumerate(method.ratios):
        reuse = False
        if step in window:
            product, row = product * ratio, row + 1
            error += abs(1.0 - product)
            reuse = error < method.threshold and (method.max_reused is None or row <= method.max_reused)
        if not reuse:
            product, error, row = 1.0, 0.0, 0
        decided.append(reuse)
    return decided


def thresholds(method: FeatureCache, count: int) -> list[float]:
    """Return rising thresholds between all sums of errors that can be accumulated in a run of this length."""
    assert method.ratios is not None
    sums = {0.0}
    for start in range(1, count):
        product, error = 1.0, 0.0
        for ratio in method.ratios[start:]:
            product *= ratio
            error += abs(1.0 - product)
            sums.add(error)
    rising = sorted(sums)
    return [math.nextafter(value, math.inf) for value in rising]


def in_whole_run(own: Mapping[str, tuple[FeatureCache, float]]) -> dict[str, FeatureCache]:
    """Place the ratios of several denoisers, each of which makes some of the steps, in the run that they share.

    Args:
        own: for each denoiser its cache, with the ratios of its own steps, and the noise level of its first step.

    Returns:
        The caches with a ratio for each step of the run; those of others are 1. `start` counts from the denoiser's own
        first step.
    """
    total = sum(len(cache.ratios or ()) for cache, _ in own.values())
    placed, before = {}, 0
    for name, (cache, _) in sorted(own.items(), key=lambda item: -item[1][1]):
        ratios = cache.ratios or ()
        after = total - before - len(ratios)
        start = (before + cache.window(len(ratios)).start) / total
        whole = (1.0,) * before + ratios + (1.0,) * after
        placed[name] = cache.model_copy(update={"ratios": whole, "start": round(start, 6)})
        before += len(ratios)
    return {name: placed[name] for name in own}


def decisions(positions: Sequence[Position], method: FeatureCache) -> Iterator[Tensor]:
    """Yield (B,) bool for each recorded call: the samples that would be reused."""
    count = 1 + max(step for position in positions for step in position.steps)
    table = reused_steps(method, count)
    for position in positions:
        yield torch.tensor([table[step] for step in position.steps])
