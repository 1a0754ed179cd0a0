"""Weights that are brought to the computing device when they are needed and taken away again, by hooks of others.

Hooks of accelerate and diffusers hang on the forward of a block. What methods do beside that forward needs care: they
look at the first norm of a block before it runs, and skip blocks whose hooks others rely on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


def home(model: nn.Module) -> torch.device:
    """The device that a model computes on; while its weights are offloaded they are elsewhere."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
        group = _group(module)
        if group is not None:
            return torch.device(group.onload_device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def away(model: nn.Module, part: nn.Module, writing: bool = False) -> bool:
    """Whether the weights of a part are not in its parameters between calls of the model.

    Args:
        model: that the part is in.
        part: to look at.
        writing: ask whether what is written into them now would be lost.
    """
    own = {id(parameter) for parameter in part.parameters()}
    if any(parameter.is_meta for parameter in part.parameters()):
        return True
    for module in model.modules():
        group = _group(module)
        if group is None or not (group.offload_to_disk_path or (writing and group.stream)):
            continue
        members = [parameter for each in group.modules for parameter in each.parameters()]
        if own & {id(parameter) for parameter in (*members, *group.parameters)}:
            return True
    return False


class Weights:
    """Which offloaded groups of blocks are on the computing device, during one call of a model.

    In a group of diffusers the first block brings the weights of all and the last takes them away. That goes wrong
    where one of the two does not run, or where a block runs once for each of several groups of samples.
    """

    def __init__(self) -> None:
        self._there: set[int] = set()

    @contextmanager
    def present(self, block: nn.Module) -> Iterator[None]:
        """Within this context the weights of a block that is about to run, or to be skipped, can be used."""
        self._bring(_group(block))
        hook: Any = vars(block).get("_hf_hook")
        if hook is None:
            yield
            return
        hook.pre_forward(block)
        try:
            yield
        finally:
            hook.post_forward(block, None)

    def around(self, block: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a block, which is `call` with the block before its arguments."""
        group = _group(block)
        return partial(call, block) if group is None else partial(self._around, group, block, call)

    def _around(self, group: Any, block: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if group.onload_leader not in (None, block):
            self._bring(group)
        self._there.add(id(group))
        following = _hook(block).next_group  # which this block brings along while it computes
        if following is not None and not following.onload_self:
            self._there.add(id(following))
        out = call(block, *args, **kwargs)
        if group.offload_leader is block:
            self._there.discard(id(group))
        return out

    def skipped(self, block: nn.Module) -> None:
        """A block does not run: if it is the last of its group, the weights go nevertheless."""
        group = _group(block)
        if group is not None and group.offload_leader is block and id(group) in self._there:
            group.offload_()
            self._there.discard(id(group))

    def _bring(self, group: Any) -> None:
        if group is None or id(group) in self._there:
            return
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
        self._there.add(id(group))


def _hook(module: nn.Module) -> Any:
    registry: Any = vars(module).get("_diffusers_hook")
    return None if registry is None else registry.get_hook("group_offloading")


def _group(module: nn.Module) -> Any:
    """The group of a block that diffusers offloads; None for others."""
    hook = _hook(module)
    return None if hook is None else hook.group
