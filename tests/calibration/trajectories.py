"""Calls of tiny models as samplers make them: straight paths from noise to an image, step by step."""

from __future__ import annotations

from typing import Any

import torch

from tests.contract.models import TINY, latents

LEVELS = (0.98, 0.85, 0.72, 0.6, 0.47, 0.34, 0.21, 0.08)


def trajectory(
    name: str, levels: tuple[float, ...] = LEVELS, branches: int = 2, batch: int = 2
) -> list[dict[str, Any]]:
    """One trajectory; guidance branches are calls of their own at each level."""
    tiny, calls = TINY[name], []
    for level in levels:
        for branch in range(branches):
            call = {**tiny.inputs(batch), **tiny.at(batch, level)}
            image = "x" if "x" in call else "hidden_states"
            call[image] = at(call[image], level, branch)
            calls.append(call)
    return calls


def at(noise: Any, level: float, branch: int) -> Any:
    """Noise and an image of its own for every sample, mixed."""
    if isinstance(noise, list):
        return list(at(torch.stack(noise), level, branch))
    image = latents(2 * len(noise), *noise.shape[1:])[len(noise) :] * 0.5 + branch
    return level * noise + (1 - level) * image
