"""Prepare wrapped transformers to be trained against themselves without their methods, and compute their losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import (
    add_lora,
    attached,
    disabled,
    linear_layers,
    lora_rank,
    lora_tensors,
    losses,
    set_tail_drop,
    untraced,
)
from tokdyn.errors import InputError
from tokdyn.recorder import evaluating
from tokdyn.scaling.rehearsal import is_plain
from tokdyn.seeds import Stream, seed_everything
from tokdyn.upcycling.distil_settings import DistilSettings
from tokdyn.upcycling.distillation import normalised_mse

RANK = 16
"""Rank of LoRA, if none is set."""


def prepare(student: nn.Module, settings: DistilSettings, teacher: nn.Module | None = None) -> list[nn.Parameter]:
    """Check that a student can be trained, give it LoRA if it is to have some, and return the parameters to train.

    Raises:
        InputError: No method has parameters, a setting does not fit the model, or there is no teacher.
    """
    attachment = attached(student)
    parts = list(attachment.parts.parameters())
    if not attachment.methods or not (parts or settings.trained == "lora"):
        raise InputError(
            "none of the methods on this model has parameters to train; wrap it with Chunking, for example."
        )
    if settings.tail_drops is not None and not attachment.takes("tail_drop"):
        raise InputError("tail_drops has no effect on these methods, which drop no tokens; remove it, or add Chunking.")
    if settings.gradient_checkpointing and not getattr(student, "_supports_gradient_checkpointing", False):
        raise InputError(f"a {type(student).__name__} cannot recompute its activations; remove gradient_checkpointing.")
    if settings.trained == "all":
        if teacher is None:
            raise InputError("trained='all' changes the transformer itself; give a copy of the original as teacher.")
        if not all(map(is_plain, student.parameters())):
            raise InputError(
                f"the weights of this {type(student).__name__} are quantised and cannot be trained; set trained=lora, "
                "which trains beside them."
            )
        return list(student.parameters())
    if settings.trained == "lora":
        rank = lora_rank(student)
        if rank is None:
            seed_everything(settings.seed, Stream.WEIGHTS, 1)
            add_lora(student, linear_layers(student, attachment.blocks(student)), settings.rank or RANK)
        elif settings.rank not in (None, rank):
            raise InputError(f"rank is {settings.rank}, but the model has LoRA of rank {rank} already; leave it out.")
        parts += lora_tensors(student).values()
    return parts


@contextmanager
def training(student: Any, settings: DistilSettings, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Put a student into training mode with only these parameters trained; afterwards it is as it was."""
    required = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    wanted, mode = set(trained), student.training
    checkpoints = settings.gradient_checkpointing and not student.is_gradient_checkpointing
    for parameter, _ in required:
        parameter.requires_grad_(parameter in wanted)
    if checkpoints:
        student.enable_gradient_checkpointing()
    student.train()
    try:
        with keeping_tail_drop(student):
            yield
    finally:
        student.train(mode)
        if checkpoints:
            student.disable_gradient_checkpointing()
        for parameter, requires in required:
            parameter.requires_grad_(requires)


@contextmanager
def keeping_tail_drop(student: nn.Module) -> Iterator[None]:
    """Give a student back the tail drop that it has now, whatever is set meanwhile."""
    attachment = attached(student)
    before = attachment.settings.tail_drop
    try:
        yield
    finally:
        attachment.set(tail_drop=before)


def target_of(student: nn.Module, teacher: nn.Module | None, call: Mapping[str, Any]) -> Tensor:
    """Return what the original predicts for a call.

    Args:
        student: The wrapped transformer.
        teacher: The original; None is the student with its methods and its LoRA disabled.
        call: Arguments of the call.
    """
    with torch.no_grad(), disabled(student) if teacher is None else nullcontext():
        return _prediction((teacher or student)(**call))


def losses_of(
    student: nn.Module, target: Tensor, call: Mapping[str, Any], drop: float | None = None
) -> dict[str, Tensor]:
    """Compute the losses of a call: "output", the error of its prediction, and those of the methods.

    Args:
        student: The wrapped transformer.
        target: What the original predicts.
        call: Arguments of the call.
        drop: Tail drop; None leaves it as it is set.
    """
    if drop is not None:
        set_tail_drop(student, drop)
    terms = {"output": _error(_prediction(student(**call)), target)}
    return terms | {name: value for name, value in losses(student).items() if value.requires_grad}


def mean_errors(
    student: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    drops: Sequence[float | None],
    teacher: nn.Module | None = None,
) -> list[float]:
    """Return the mean error of a student's predictions for calls at each of some tail drops; see `normalised_mse`."""
    sums = [0.0] * len(drops)
    with evaluating(student), keeping_tail_drop(student), untraced(attached(student)):
        for call in calls:
            target = target_of(student, teacher, call)
            for place, drop in enumerate(drops):
                sums[place] += losses_of(student, target, call, drop)["output"].item()
    return [each / len(calls) for each in sums]


def _prediction(returned: Any) -> Tensor:
    """Return the prediction from the output of a transformer; some return a list with a tensor per sample."""
    first = getattr(returned, "sample", None)  # outputs of tokdyn.DiT have no indices, and tuples no names
    first = returned[0] if first is None else first
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of a prediction over the variance of all elements of the target."""
    return normalised_mse(prediction.reshape(-1, 1), target.reshape(-1, 1))
