"""Tokens that diffusers splits over devices (context parallelism): whether it does, and between which processes."""

from __future__ import annotations

from typing import Any

from torch import nn


def context_parallel(*modules: nn.Module) -> Any:
    """Return the `ContextParallelConfig` by which diffusers splits tokens that a module gets; None if it does not.

    Args:
        modules: a model, whose arguments are split when it is called, or one of its blocks, likewise.
    """
    for module in modules:
        held = vars(module)
        config = getattr(held.get("_parallel_config"), "context_parallel_config", None)
        if config is not None:
            return config
        hook = _splitter(module) if "_diffusers_hook" in held else None
        if hook is not None:
            return hook.parallel_config
    return None


def splits(module: nn.Module) -> bool:
    """Whether diffusers splits the tokens that a module is called with, before it computes them."""
    return "_diffusers_hook" in vars(module) and _splitter(module) is not None


def token_group(*modules: nn.Module) -> Any:
    """Return the group of the processes between which the tokens are split; None if they are not.

    Args:
        modules: a model and its first block.
    """
    mesh = getattr(context_parallel(*modules), "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def _splitter(module: nn.Module) -> Any:
    """Return the hook, among those of diffusers, that splits what a module is called with; None if there is none."""
    hooks = vars(module)["_diffusers_hook"].hooks
    return next((hook for name, hook in hooks.items() if name.startswith("cp_input")), None)
