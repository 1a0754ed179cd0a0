"""Train in several processes, each of which computes a part of the calls of a step.

All weights are whole in every process. Only what is trained has gradients, and they are summed over the processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from tokdyn.errors import InputError
from tokdyn.host import open_device
from tokdyn.team import ENGINES, USE_FSDP, asks_for, connected, launched


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    Attributes:
        rank: number of this process, from 0.
        count: number of all of them.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def joined() -> Processes:
        """Return those of `torch.distributed`, if it is initialised; else this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return Processes()
        return Processes(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def check_divides(self, calls: int) -> None:
        """Check that every process gets as many calls of a step as the others.

        Raises:
            InputError: they do not divide.
        """
        if calls % self.count:
            raise InputError(
                f"calls is {calls}, which does not divide over {self.count} processes; choose a multiple of "
                f"{self.count}."
            )

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place, in one transfer; a missing one counts as zeros."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for parameter, summed in zip(parameters, torch.split(flat, [each.numel() for each in parameters]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def add(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Sum numbers over the processes, which all have them by the same names."""
        if self.count == 1:
            return values
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(numbers)
        return dict(zip(values, numbers.tolist(), strict=True))


@contextmanager
def together(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun or accelerate have started, if they have; a context manager.

    Args:
        device: its name, as in `open_device`; "auto" gives every process a GPU of its own.

    Yields:
        The device of this process.

    Raises:
        InputError: the machine has no such device, the launcher asks for weights that are divided over the processes,
            or the other processes cannot be reached.
    """
    for variable, engine in {USE_FSDP: "FSDP", **ENGINES}.items():
        if asks_for(variable):
            raise InputError(
                f"the launcher asks for {engine} ({variable}), but the weights of a pipeline are whole in every "
                "process that trains its methods; launch it with torchrun, or leave that out of accelerate's "
                "configuration."
            )
    opened = open_device(device)
    if launched() == 1:
        yield opened
        return
    if opened.type == "cuda":
        opened = torch.device("cuda", opened.index or int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(opened)
    with connected("nccl" if opened.type == "cuda" else "gloo"):
        yield opened
