"""Work with offloaded weights, which hooks of accelerate and diffusers bring to the computing device and back.

The hooks run when a block is called. Methods, however, use the first norm of a block before the block is called, and
skip blocks whose hooks would onload or offload the weights of other blocks. This module makes up for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


def home(model: nn.Module) -> torch.device:
    """Return the device that a model computes on, even if its weights are offloaded to another."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
        group = _group(module)
        if group is not None:
            return torch.device(group.onload_device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def weights_are_offloaded(model: nn.Module, part: nn.Module, writing: bool = False) -> bool:
    """Return whether parameters of a part of a model cannot be read between calls of the model.

    They cannot if they are on the meta device or offloaded to disk.

    Args:
        model: the model that holds the part.
        part: the module to look at.
        writing: whether to return True also if a change to the parameters would be lost, because each onload copies
            them from another tensor.
    """
    own = {id(parameter) for parameter in part.parameters()}
    if any(parameter.is_meta for parameter in part.parameters()):
        return True
    for module in model.modules():
        group = _group(module)
        if group is None or not (group.offload_to_disk_path or (writing and group.stream)):
            continue
        members = [parameter for member in group.modules for parameter in member.parameters()]
        if own & {id(parameter) for parameter in (*members, *group.parameters)}:
            return True
    return False


class Residency:
    """Keeps track, during one call of a model, of which groups of blocks are on the computing device.

    diffusers offloads blocks in groups: the first block of a group onloads the weights of all its blocks, and the last
    one offloads them. This fails if the first or the last is skipped, or if a block runs more than once, for several
    groups of samples.
    """

    def __init__(self) -> None:
        self._onloaded: set[int] = set()

    @contextmanager
    def present(self, block: nn.Module) -> Iterator[None]:
        """Have the weights of a block on the computing device, whether or not the block runs afterwards.

        A group that diffusers onloads stays onloaded until its last block runs or is skipped. Of a block whose weights
        are sharded (`fully_shard`), every process has to do this in the same call.
        """
        sharded: Any = block
        if hasattr(sharded, "unshard"):
            sharded.unshard()
            try:
                yield
            finally:
                sharded.reshard()
            return
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
        """Return a function that calls `call(block, ...)` and onloads and offloads the group of the block around it."""
        group = _group(block)
        return partial(call, block) if group is None else partial(self._around, group, block, call)

    def _around(self, group: Any, block: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a block of a group: onload the group first if its first block was skipped, and keep track of it."""
        if group.onload_leader not in (None, block):
            self._onload(group)
        self._onloaded.add(id(group))
        following = _hook(block).next_group  # diffusers onloads this group while the block computes
        if following is not None and not following.onload_self:
            self._onloaded.add(id(following))
        out = call(block, *args, **kwargs)
        if group.offload_leader is block:
            self._onloaded.discard(id(group))
        return out

    def skipped(self, block: nn.Module) -> None:
        """Offload the group of a block that is skipped, if the block is the last one of its group."""
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
    """Return the group in which diffusers offloads a block; None if it does not."""
    hook = _hook(module)
    return None if hook is None else hook.group
