"""What can be seen of a call from outside: its noise levels, its input beside the input before, and its conditioning.

Everything stays on the device until somebody asks for it: observing a call never makes the host wait, and asking makes
it wait once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokdyn.trace.branches import Branch
from tokdyn.trace.comparison import SAME, UNKNOWN, Comparison
from tokdyn.trace.conditioning import LEVEL_NAMES, Conditions
from tokdyn.trace.timing import Stopwatch


class SampleSeen(NamedTuple):
    """What is seen of one sample of a call.

    Attributes:
        level: noise level; 1 is pure noise.
        alike: how much its input resembles that of the call before, see `tokdyn.trace.comparison.Resemblance`.
        moved: distance of its input from the one before, relative to that.
        condition: tells its conditioning from others.
    """

    level: float
    alike: float
    moved: float
    condition: tuple[float, ...] = ()


class Observation:
    """One call, seen from outside.

    Attributes:
        branch: what is known of the guidance branches of the call; None where nobody said anything.
        step: index of the step, where a pipeline gave one.
        on_host: whether reading it waits for no device.
        timer: measures how long the call takes.
        dense: measures how long the same call takes without methods, within the time of `timer`; None if it is not
            made.
    """

    def __init__(
        self,
        levels: Tensor,
        conditions: Conditions,
        compared: Comparison | float,
        branch: Branch | None = None,
        step: int | None = None,
    ) -> None:
        """Note what can be read later.

        Args:
            levels: (B,) or (1,) fp32 noise levels.
            conditions: what the samples are conditioned on.
            compared: the comparison of the input with that of the call before, or `SAME` or `UNKNOWN` of all samples.
            branch: of guidance, where that is known.
            step: index of the step.
        """
        self.branch, self.step, self.on_host = branch, step, conditions.rows is not None
        self.timer: Stopwatch | None = None
        self.dense: Stopwatch | None = None
        self._unread: tuple[Tensor, Conditions, Comparison | float] | None = levels, conditions, compared
        self._samples: list[SampleSeen] = []

    @property
    def parts(self) -> tuple[str, ...] | None:
        """Names of the branches in equal parts of the batch; () for a call of one branch, None where unknown."""
        return self.branch if isinstance(self.branch, tuple) else None

    @property
    def samples(self) -> list[SampleSeen]:
        """What is seen of each sample, in one transfer from the device."""
        if self._unread is not None:
            self._samples, self._unread = self._read(*self._unread), None
        return self._samples

    @property
    def seconds(self) -> float | None:
        """How long the call took, without the dense call beside it; None where that is not known."""
        whole = None if self.timer is None else self.timer.seconds
        beside = 0.0 if self.dense is None else self.dense.seconds
        return None if whole is None or beside is None else whole - beside

    @property
    def dense_seconds(self) -> float | None:
        """How long the same call took without methods; None where it was not made."""
        return None if self.dense is None else self.dense.seconds

    @contextmanager
    def timing_dense(self) -> Iterator[None]:
        """Measure the same call without methods, which is made within this context."""
        if self.timer is None:
            yield
            return
        self.dense = Stopwatch(self.timer.device)
        try:
            yield
        finally:
            self.dense.stop()

    @staticmethod
    def _read(levels: Tensor, conditions: Conditions, compared: Comparison | float) -> list[SampleSeen]:
        columns: list[Any] = []
        if conditions.rows is not None:
            level, condition = levels.tolist(), conditions.rows
        else:
            given = compared.columns if isinstance(compared, Comparison) else ()
            level, condition, *columns = _to_host(levels, conditions.values, *given)
        if isinstance(compared, Comparison):
            found = compared.read(*columns)
        else:
            found = [(compared, 0.0 if compared == SAME else UNKNOWN)] * len(condition)
        if len(level) != len(condition):
            level = level * len(condition)
        return [
            SampleSeen(each, alike, moved, known)
            for each, (alike, moved), known in zip(level, found, condition, strict=True)
        ]


def _to_host(levels: Tensor, *columns: Tensor) -> list[Any]:
    """Bring levels (B,) or (1,) and columns (B, ...) to the host in one transfer, as lists of rows."""
    batch = len(columns[0])
    parts = [levels.to(columns[0].device).expand(batch)[:, None], *columns]
    rows = torch.cat(parts, dim=1).tolist()
    ends = list(itertools.accumulate((part.shape[1] for part in parts), initial=0))
    level, *rest = ([tuple(row[start:end]) for row in rows] for start, end in itertools.pairwise(ends))
    return [[value for (value,) in level], *rest]


def prediction_in(output: Any) -> Tensor | None:
    """Find the prediction in whatever a model returned, lists stacked; None where there is none."""
    value = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
        return torch.stack(value) if len({item.shape for item in value}) == 1 else None
    return value if isinstance(value, Tensor) else None


def main_input(arguments: Mapping[str, Any]) -> Tensor | None:
    """The latents that a call is about: its first floating-point tensor, or list of tensors, with an entry a sample.

    Args:
        arguments: of the call, by name.

    Returns:
        (B, ...) the tensor itself, lists stacked; None where there is none or the sizes in a list differ.
    """
    for name, value in arguments.items():
        if name in LEVEL_NAMES:
            continue
        if isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point():
            return value
        if isinstance(value, list) and value and all(isinstance(item, Tensor) for item in value):
            alike = len({item.shape for item in value}) == 1 and value[0].is_floating_point()
            return torch.stack(value) if alike else None
    return None
