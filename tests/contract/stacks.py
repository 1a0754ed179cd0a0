"""Stacks of methods that the contract is checked with, and the models that they fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

import tokdyn
from tests.contract.coverage_arranged import ARRANGED
from tests.contract.coverage_images import IMAGES
from tests.contract.coverage_videos import VIDEOS
from tests.contract.models import TINY, sit, works
from tests.contract.widths import random_gates
from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, FeatureCache, Method, TokenDrop, TokenMerge

ACTIVE: dict[str, list[Method]] = {
    "merge": [TokenMerge(ratio=0.5)],
    "merge-both": [TokenMerge(ratio=0.4, where="both", seed=3, window=2)],
    "merge-weighted": [TokenMerge(ratio=0.5, seed=1, weighted=True, reuse=2)],
    "merge-important": [TokenMerge(ratio=0.3, where="mlp", important=True)],
    "drop": [TokenDrop(rate=0.5)],
    "drop-nested": [TokenDrop(rate=0.5, blocks=(0, 3)), TokenDrop(rate=0.5, blocks=(1, 2))],
    "skip": [DepthSkip(blocks=(1, -1))],
    "cache": [FeatureCache(threshold=0.5)],
    "cache-first": [FeatureCache(threshold=0.5, indicator="first_block", forecast=1)],
    "stack": [FeatureCache(threshold=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(2,))],
    "curves": [TokenMerge(ratio=((0.0, 0.2), (1.0, 0.6))), DepthSkip(table=((0.0, 0.5, (1,)), (0.5, 1.0, (2,))))],
    "chunk": [Chunking(target=3)],
    "chunk-merge": [Chunking(target=3), TokenMerge(ratio=0.3, window=2, metric_width=16)],
    "chunk-ragged": [Chunking(target=2, ragged=True, tail_drop=((0.0, 0.3), (1.0, 0.1)), router="cosine")],
    "chunk-stack": [FeatureCache(threshold=0.5), Chunking(target=2), TokenMerge(ratio=0.3), DepthSkip(blocks=(2,))],
    "chunk-ragged-train": [Chunking(target=2, ragged=True), TokenDrop(rate=0.5), TokenMerge(ratio=0.3)],
    "gates": [DepthSkip(learned=True)],
    "width": [DynamicWidth()],
    "width-heads": [DynamicWidth(channels=False, tokens=False)],
    "width-tokens": [DynamicWidth(heads=False, channels=False)],
    "width-stack": [FeatureCache(threshold=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(2,)), DynamicWidth()],
    "chunk-width": [Chunking(target=2), DynamicWidth()],
    "stack-train": [TokenDrop(rate=0.5), TokenMerge(ratio=0.5), DepthSkip(blocks=(3,))],
}
NEUTRAL: dict[str, list[Method]] = {
    "nothing": [],
    "merge": [TokenMerge(ratio=0.0)],
    "drop": [TokenDrop(rate=0.0)],
    "skip": [DepthSkip()],
    "skip-elsewhere": [DepthSkip(blocks=(1,), levels=(0.8, 1.0))],
    "cache": [FeatureCache(threshold=0.0)],
    "chunk": [Chunking(target=1.0)],
    "gates": [DepthSkip(learned=True)],
    "width": [DynamicWidth()],
    "width-heads": [DynamicWidth(channels=False, tokens=False)],
    "width-tokens": [DynamicWidth(heads=False, channels=False)],
    "width-none": [DynamicWidth(target=1.0)],
    "all": [FeatureCache(threshold=-1.0), TokenMerge(ratio=0.0), DepthSkip()],
}
KNOWN = {**TINY, **IMAGES, **VIDEOS, **ARRANGED, "SiT": replace(TINY["DiT"], build=sit)}
"""All tiny models by class, also those that the whole contract is not checked on."""
PAIRS = [(name, methods) for name, methods in product(sorted(TINY), ACTIVE) if works(name, ACTIVE[methods])]
"""(model, stack) that go together."""
REFUSED = sorted({*product(sorted(TINY), ACTIVE)} - {*PAIRS})
"""(model, stack) that `wrap` refuses."""


@torch.no_grad()
def acting(model: nn.Module) -> nn.Module:
    """Let what is learned act in a wrapped tiny model: gates open and shut, and routers keep what they should."""
    generator = torch.Generator().manual_seed(0)
    methods = []
    for method, part in tokdyn.parts(random_gates(model)):
        methods.append(method)
        if isinstance(method, DepthSkip) and part is not None:
            part.score.weight.copy_(torch.randn(part.score.weight.shape, generator=generator))
            part.score.bias.zero_()
    if any(isinstance(method, Chunking) and method.target > 1 for method in methods):
        tokdyn.calibrate_router(model, **KNOWN[type(model).__name__].inputs(4))
    return model


def at_levels(name: str, levels: tuple[float, ...] = (0.3, 0.7, 0.3)) -> dict[str, Any]:
    """Arguments of a call with samples at different noise levels."""
    clocks = [KNOWN[name].at(1, level) for level in levels]
    clock = {key: torch.cat([each[key] for each in clocks]) for key in clocks[0]}
    return {**KNOWN[name].inputs(len(levels)), **clock}
