"""Calls of tiny models on straight paths from noise to an image, as samplers make them, and hooks that watch blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.models import TINY, latents
from tokdyn.adapters import adapter_for
from tokdyn.adapters.base import Blocks
from tokdyn.tokens import cells

LEVELS = (0.98, 0.85, 0.72, 0.6, 0.47, 0.34, 0.21, 0.08)


def trajectory(
    name: str, levels: tuple[float, ...] = LEVELS, branches: int = 2, batch: int = 2
) -> list[dict[str, Any]]:
    """Build the calls of one trajectory, with one call per guidance branch at each level."""
    tiny, calls = TINY[name], []
    for level in levels:
        for branch in range(branches):
            call = {**tiny.inputs(batch), **tiny.at(batch, level)}
            image = "x" if "x" in call else "hidden_states"
            call[image] = noised(call[image], level, branch)
            calls.append(call)
    return calls


def noised(noise: Any, level: float, branch: int) -> Any:
    """Mix noise with a different image for every sample."""
    if isinstance(noise, list):
        return list(noised(torch.stack(noise), level, branch))
    image = latents(2 * len(noise), *noise.shape[1:])[len(noise) :] * 0.5 + branch
    return level * noise + (1 - level) * image


def watch_blocks(model: nn.Module, call: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Call a plain model; return the image tokens before and after each block, and what its attention gets.

    The last is the modulated input that the adapter declares, or the image tokens before the block without one.
    """
    adapter, seen, handles = adapter_for(model), [], []

    def image(x: Tensor, where: str) -> Tensor:
        if where == "all" or adapter.grid is None:
            return x
        count = cells(adapter.grid(model, call))
        return x[:, :count] if where == "first" else x[:, -count:]

    def watcher(stack: Blocks) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            named = {**dict(zip(inspect.signature(block.forward).parameters, args, strict=False)), **kwargs}
            before = image(named[stack.tokens], stack.image)
            after = (out if isinstance(out, tuple) else (out,))[stack.returns.index("tokens")]
            modulated = stack.modulated(block, named) if stack.modulated else before
            seen.append((before, image(after, stack.image), modulated))

        return hook

    for stack in adapter.blocks:
        blocks = model.get_submodule(stack.path)
        handles += [block.register_forward_hook(watcher(stack), with_kwargs=True) for block in blocks]
    try:
        model(**call)
    finally:
        for handle in handles:
            handle.remove()
    return seen
