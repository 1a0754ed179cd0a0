"""Stacks of methods, and trajectories, for the tests of wrapped models among other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tokdyn
from tests.contract.models import TINY, one_of, sample, works
from tests.contract.widths import random_gates
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge

SAMPLING = {
    "merge": [TokenMerge(ratio=0.5, where="both")],
    "skip": [DepthSkip(blocks=(0, 3))],
    "levels": [DepthSkip(table=((0.0, 0.5, (0, 1)), (0.5, 1.0, (3,))))],
    "gates": [DepthSkip(learned=True)],
    "cache": [FeatureCache(threshold=float("inf"), num_steps=3)],
    "cache-first": [FeatureCache(threshold=0.5, indicator="first_block")],
    "chunk": [Chunking(target=2)],
    "chunk-cosine": [Chunking(target=2, router="cosine", sigma=None)],
    "width": [DynamicWidth()],
    "stack": [FeatureCache(threshold=0.5), Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(blocks=(2,))],
    "width-stack": [FeatureCache(threshold=0.5), TokenMerge(ratio=0.3), DepthSkip(blocks=(2,)), DynamicWidth()],
}
FIXED = [Chunking(target=2, loss_weight=0.0), TokenMerge(ratio=0.3), DepthSkip(blocks=(1,))]
"""Trained without anything random, and without a loss that is no mean over samples."""
RANDOM = [Chunking(target=2), TokenDrop(rate=0.5), DepthSkip(learned=True)]
TRAINING = [Chunking(target=2), TokenDrop(rate=0.5), TokenMerge(ratio=0.3), DepthSkip(learned=True)]
MODELS = sorted(TINY)
FEW = ["DiT", "FluxTransformer2DModel", "PixArtTransformer2DModel", "WanTransformer3DModel"]
LEVELS = (0.9, 0.4)


def fits(name: str, stack: str) -> bool:
    """Whether a stack of the table can be attached to a model of that name."""
    return works(name, SAMPLING[stack])


def stack_of(name: str) -> str:
    """The name of a stack that a model can have: the largest one."""
    return next(stack for stack in ("stack", "cache", "skip") if fits(name, stack))


def equip(model: nn.Module, stack: str | list[tokdyn.methods.Method]) -> nn.Module:
    """Wrap a model; trained parts get the same random numbers every time, so that gates open and shut."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        tokdyn.wrap(model, SAMPLING[stack] if isinstance(stack, str) else stack)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.tokdyn.named_parameters():
            if name.endswith(("score.weight", "residual.weight")) and parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
            elif name.endswith("score.bias"):
                parameter.zero_()
    return random_gates(model)


def predict(model: nn.Module, name: str, level: float = 0.5, batch: int = 2) -> Tensor:
    """(B, ...) what a model, or what it is in, predicts at a noise level."""
    tiny = TINY[name]
    return sample(model(**{**tiny.inputs(batch), **tiny.at(batch, level)}))


@torch.no_grad()
def trajectory(model: nn.Module, name: str) -> Tensor:
    """(S, B, ...) what a model predicts at falling noise levels."""
    return torch.stack([predict(model, name, level) for level in LEVELS])


def half(name: str, rank: int) -> dict[str, Any]:
    """One half of a batch of four."""
    return next(part for place, part in enumerate(halves(name)) if place == rank)


def halves(name: str) -> list[dict[str, Any]]:
    """The two halves of a batch of four."""
    pairs = [[one_of(TINY[name].inputs(4), place + i) for i in range(2)] for place in (0, 2)]
    return [
        {key: torch.cat([first[key], second[key]]) if isinstance(first[key], Tensor) else first[key] for key in first}
        for first, second in pairs
    ]


def step_loss(model: nn.Module, name: str, inputs: dict[str, Any]) -> Tensor:
    """A loss that is a mean over samples, and those of the methods."""
    loss: Tensor = sample(model(**inputs)).square().mean()
    return loss + sum(tokdyn.losses(model).values())
