"""Work out the memory of a distillation before its first step, without computing or allocating anything.

A copy of the student with tensors that have shapes and no values (torch's fake tensors) runs the forward and backward
passes of a step, and the storages that live at the same time are added up. Weights, what the optimizer keeps and the
recorded calls are counted as they are.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tokdyn.attach import Meter, attached
from tokdyn.scaling.rehearsal import Living, held, twin_of, without_values
from tokdyn.upcycling.distil_settings import DistilSettings
from tokdyn.upcycling.students import losses_of, prepare, target_of, training

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
    # AdamW computes the roots of all moments at once on an accelerator, and those of one tensor at a time on a CPU
    apart = all(parameter.device.type == "cpu" for parameter in trained)
    update = gradients + _FLOAT * (max(parameter.numel() for parameter in trained) if apart else elements)
    modules = [student, *([] if teacher is None else [teacher]), *others]
    weights = [each for module in modules if isinstance(module, nn.Module) for each in held(module)]
    drop = None if settings.tail_drops is None else min(settings.tail_drops)
    step = max(rehearse(student, teacher, settings, trained, largest, drop), update)
    gc.collect()  # the copy is made of cycles
    return Memory(size_of(weights), _MOMENTS * _FLOAT * elements, size_of(calls) + drawn, step)


def size_of(values: Any) -> int:
    """Return the bytes of the storages of all tensors in nested lists and dictionaries, each counted once."""
    storages = [
        part.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor) for part in _inside(each)
    ]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _inside(value: Tensor) -> list[Tensor]:
    """Return the tensors that a tensor consists of: itself, or those inside of a quantised one."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [part for name in value.__tensor_flatten__()[0] for part in _inside(getattr(value, name))]


def rehearse(
    student: nn.Module,
    teacher: nn.Module | None,
    settings: DistilSettings,
    trained: Sequence[nn.Parameter],
    call: Mapping[str, Any],
    drop: float | None,
    accumulating: bool = False,
    counter: AbstractContextManager[Any] | None = None,
) -> int:
    """Rehearse the passes of a step without values.

    Args:
        student: The wrapped transformer, prepared to be trained.
        teacher: The original model, if it is a module of its own.
        settings: How the student is trained.
        trained: What is trained.
        call: The call, whose floating-point tensors are not computed with; methods read noise levels and grids of them.
        drop: Tail drop; None leaves it as the methods say.
        accumulating: Whether gradients are there from the start, and are not counted as memory.
        counter: Counts during the passes, such as torch's FlopCounterMode. While that one counts, recomputed passes
            live on, so the bytes are too many.

    Returns:
        The most bytes that live at a time, beside weights and arguments.
    """
    fake = without_values()
    copies: dict[int, Any] = {}
    twin, twin_teacher = twin_of(student, fake, copies), None if teacher is None else twin_of(teacher, fake, copies)
    # tensors of integers, such as masks and lengths, keep their values, which models read
    arguments = tree_map_only(Tensor, lambda each: fake.from_tensor(each) if each.is_floating_point() else each, call)
    attachment = attached(twin)
    learning = [copies[id(each)] for each in trained]
    if accumulating:
        with fake:
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
    known = [*held(twin), *([] if twin_teacher is None else held(twin_teacher)), arguments]
    known += [each.grad for each in learning]
    with training(twin, settings, learning), counter or nullcontext(), Living(known) as living:
        target = target_of(twin, twin_teacher, arguments)
        attachment.meter = Meter(lambda: 0, call)
        terms = losses_of(twin, target, arguments, drop)
        torch.autograd.backward(sum(terms.values(), torch.zeros_like(terms["output"])))
    most: int = living.most
    return most
