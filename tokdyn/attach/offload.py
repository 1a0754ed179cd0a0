"""Offloaded weights: hooks of accelerate and diffusers bring them to the computing device and back.

These hooks hang on the forward of a block. Methods look at the first norm of a block before it runs, and skip blocks
whose hooks other blocks rely on; both need the care of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


def home(model: nn.Module) -> torch.device:
    """Find the device that a model computes on, which is another than that of its weights while they are offloaded."""
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


def weights_are_offloaded(model: nn.Module, part: nn.Module, writing: bool = False) -> bool:
    """Whether the weights of a part are offloaded between calls of the model.

    Args:
        model: that the part is in.
        part: to look at.
        writing: whether what is written into the parameters now would be lost.
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


class Residency:
    """Which groups of blocks that diffusers offloads are on the computing device, during one call of a model.

    In such a group the first block onloads the weights of all and the last offloads them. That goes wrong where one of
    the two is skipped, or where a block runs once for each of several groups of samples.
    """

    def __init__(self) -> None:
        self._onloaded: set[int] = set()

    @contextmanager
    def present(self, block: nn.Module) -> Iterator[None]:
        """Make the weights of a block usable, whether it is about to run or to be skipped."""
        self._onload(_group(block))
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
        """Make the call of a block, `call(block, ...)`, onload and offload its group."""
        group = _group(block)
        return partial(call, block) if group is None else partial(self._around, group, block, call)

    def _around(self, group: Any, block: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if group.onload_leader not in (None, block):
            self._onload(group)
        self._onloaded.add(id(group))
        following = _hook(block).next_group  # this block onloads it while it computes
        if following is not None and not following.onload_self:
            self._onloaded.add(id(following))
        out = call(block, *args, **kwargs)
        if group.offload_leader is block:
            self._onloaded.discard(id(group))
        return out

    def skipped(self, block: nn.Module) -> None:
        """Offload the group of a block that is skipped, if the block is the last of it."""
        group = _group(block)
        if group is not None and group.offload_leader is block and id(group) in self._onloaded:
            group.offload_()
            self._onloaded.discard(id(group))

    def _onload(self, group: Any) -> None:
        if group is None or id(group) in self._onloaded:
            return
        group.onload_()
        if group.stream is not None:
            group.stream.synchronize()
        self._onloaded.add(id(group))


def _hook(module: nn.Module) -> Any:
    registry: Any = vars(module).get("_diffusers_hook")
    return None if registry is None else registry.get_hook("group_offloading")


def _group(module: nn.Module) -> Any:
    """Find the group of a block that diffusers offloads; None for others."""
    hook = _hook(module)
    return None if hook is None else hook.group
