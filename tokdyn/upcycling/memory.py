"""Work out the memory of a distillation before its first step, without computing or allocating anything.

A copy of the student with tensors that have shapes and no values (torch's fake tensors) runs the forward and backward
passes of a step, and the storages that live at the same time are added up. Weights, what the optimizer keeps and the
recorded calls are counted as they are.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tokdyn.attach import Meter, attached
from tokdyn.upcycling.distil_settings import DistilSettings
from tokdyn.upcycling.students import is_plain, losses_of, prepare, target_of, training

_FLOAT = 4  # bytes; what is trained, its gradients and AdamW's moments are fp32
_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """The memory of a distillation on its device, in bytes.

    Attributes:
        weights: Of all modules there: the student, the teacher if it is a copy, and the rest of the pipeline.
        moments: What the optimizer keeps.
        calls: The recorded calls.
        step: The most that lives at a time during a step beside these: activations, gradients and temporaries.
    """

    weights: int
    moments: int
    calls: int
    step: int

    @property
    def total(self) -> int:
        """The sum: the most that is in use at a time."""
        return self.weights + self.moments + self.calls + self.step

    def __str__(self) -> str:
        parts = {"weights": self.weights, "optimizer": self.moments, "calls": self.calls, "a step": self.step}
        return f"{_text(self.total)}: {', '.join(f'{name} {_text(value)}' for name, value in parts.items())}"


def _text(value: int) -> str:
    """Write bytes with a unit in which they are not small."""
    return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.2f} MiB"


def memory_of(
    student: nn.Module,
    settings: DistilSettings,
    calls: Sequence[Mapping[str, Any]],
    others: Iterable[Any] = (),
    teacher: nn.Module | None = None,
    processes: int = 1,
    drawn: int = 0,
) -> Memory:
    """Work out the memory of `distil` with these arguments.

    Args:
        student: The wrapped transformer; with trained="lora" it gets its LoRA here already.
        settings: How it is trained.
        calls: The calls that are kept. The largest one decides.
        others: Modules that are on the device meanwhile, such as the other components of a pipeline.
        teacher: The original model, if it is a module of its own.
        processes: Number of processes that train together.
        drawn: Bytes of calls that are drawn during the training and kept at a time.
    """
    trained = prepare(student, settings, teacher)
    elements = sum(parameter.numel() for parameter in trained)
    largest = max(calls, key=lambda call: size_of([call]))
    gradients = _FLOAT * elements * (1 if processes == 1 else 2)  # they are summed in a copy
    update = gradients + _FLOAT * elements  # AdamW computes the roots of all moments at once
    modules = [student, *([] if teacher is None else [teacher]), *others]
    weights = [each for module in modules if isinstance(module, nn.Module) for each in _held(module)]
    step = max(_passes(student, teacher, settings, trained, largest), update)
    gc.collect()  # the copy is made of cycles
    return Memory(size_of(weights), _MOMENTS * _FLOAT * elements, size_of(calls) + drawn, step)


def size_of(values: Any) -> int:
    """Return the bytes of the storages of all tensors in nested lists and dictionaries, each counted once."""
    storages = [
        part.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor) for part in _inside(each)
    ]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _held(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def _inside(value: Tensor) -> list[Tensor]:
    """Return the tensors that a tensor consists of: itself, or those inside of a quantised one."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [part for name in value.__tensor_flatten__()[0] for part in _inside(getattr(value, name))]


def _passes(
    student: nn.Module,
    teacher: nn.Module | None,
    settings: DistilSettings,
    trained: Sequence[nn.Parameter],
    call: Mapping[str, Any],
) -> int:
    """Return the most bytes that live at a time during the passes of a step, beside weights and arguments."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copies: dict[int, Any] = {}
    twin, twin_teacher = _twin(student, fake, copies), None if teacher is None else _twin(teacher, fake, copies)
    # tensors of integers, such as masks and lengths, keep their values, which models read
    arguments = tree_map_only(Tensor, lambda each: fake.from_tensor(each) if each.is_floating_point() else each, call)
    drop = None if settings.tail_drops is None else min(settings.tail_drops)
    attachment = attached(twin)
    known = [*_held(twin), *([] if twin_teacher is None else _held(twin_teacher)), arguments]
    with training(twin, settings, [copies[id(each)] for each in trained]), _Living(known) as living:
        target = target_of(twin, twin_teacher, arguments)
        attachment.meter = Meter(lambda: 0, call)  # methods read noise levels and grids from these
        terms = losses_of(twin, target, arguments, drop)
        torch.autograd.backward(sum(terms.values(), torch.zeros_like(terms["output"])))
    most: int = living.most
    return most


def _twin(model: nn.Module, fake: FakeTensorMode, copies: dict[int, Any]) -> nn.Module:
    """Copy a model with tensors that have no values.

    Quantised layers become plain ones, whose activations are the same.

    Args:
        model: The model.
        fake: Makes the tensors.
        copies: Receives the tensors of the copy by the ids of the originals.
    """
    dtype = next((each.dtype for each in model.parameters() if is_plain(each)), torch.float32)
    for each in _held(model):
        parameter = isinstance(each, nn.Parameter)
        if id(each) in copies or not (parameter or is_plain(each)):
            continue  # counters keep their values
        with fake:
            empty = torch.empty(each.shape, dtype=each.dtype if is_plain(each) else dtype, device=each.device)
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


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
