"""Rehearse a training step on tensors that have shapes and no values, so that nothing is computed or allocated.

A copy of the model with torch's fake tensors runs the step, and the storages that live at the same time are added up.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def without_values() -> FakeTensorMode:
    """Return a mode in which tensors have no values; real ones may take part, such as those that models read."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_plain(value: Tensor) -> bool:
    """Return whether a tensor is computed with as it is, and is not quantised."""
    return type(value) in (Tensor, nn.Parameter) and value.element_size() >= 2 and value.is_floating_point()


def held(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def twin_of(model: nn.Module, fake: FakeTensorMode, copies: dict[int, Any]) -> nn.Module:
    """Copy a model with tensors that have no values.

    Quantised layers become plain ones, whose activations are the same. Tensors on the meta device, which holds no
    values either, come onto the CPU, on which all operators run.

    Args:
        model: The model.
        fake: Makes the tensors.
        copies: Receives the tensors of the copy by the ids of the originals.
    """
    dtype = next((each.dtype for each in model.parameters() if is_plain(each)), torch.float32)
    for each in held(model):
        parameter = isinstance(each, nn.Parameter)
        if id(each) in copies or not (parameter or is_plain(each) or each.is_meta):
            continue  # counters keep their values
        kind = each.dtype if is_plain(each) or not parameter else dtype
        with fake:
            empty = torch.empty(each.shape, dtype=kind, device="cpu" if each.is_meta else each.device)
        copies[id(each)] = nn.Parameter(empty, each.requires_grad and is_plain(each)) if parameter else empty
    twin = copy.deepcopy(model, dict(copies))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not is_plain(module.weight):
            sizes, device = (module.in_features, module.out_features, module.bias is not None), module.weight.device
            with fake:
                plain = nn.Linear(*sizes, device=device, dtype=dtype).requires_grad_(False)
            parent, _, child = name.rpartition(".")
            twin.get_submodule(parent)._modules[child] = plain
    return twin


def most_alive(step: Callable[[], None], fake: FakeTensorMode, known: Any) -> int:
    """Run a step without values, and return the most bytes that live at a time in it.

    Args:
        step: Runs forward and backward passes.
        fake: The mode in which its tensors were made.
        known: Tensors, in nested lists and dictionaries, whose storages are not counted.
    """
    with fake, Living(known) as living:
        step()
    gc.collect()  # copies of models are made of cycles
    most: int = living.most
    return most


class Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that live at the same time, of the results of all operations.

    Args:
        known: Tensors, in nested lists and dictionaries, whose storages are not counted.

    Attributes:
        most: The most bytes so far.
    """

    def __init__(self, known: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._now = 0
        self._sizes: dict[int, int] = {}
        for each in tree_leaves(known):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage(), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note the storages of its results; those that were there before do not count."""
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage(), 0)
        out = function(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage(), each.untyped_storage().nbytes())
        return out

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size
            self._now += size
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
