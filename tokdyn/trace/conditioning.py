"""What the samples of a call are conditioned on, summed up so that two prompts can be told apart."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.trace.comparison import version

LEVEL_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")
"""Names that models give to the argument that holds the noise level."""
Source = Tensor | Sequence[Tensor]
"""An argument with an entry a sample: a tensor, or a list of one tensor a sample."""


@dataclass(frozen=True)
class Conditions:
    """What the samples of a call are conditioned on.

    Attributes:
        values: (B, K) fp32 `conditioning`.
        rows: the same on the host, where that waits for no device.
    """

    values: Tensor
    rows: list[tuple[float, ...]] | None


class Conditioning:
    """The conditions of the last calls; the same tensors, unchanged, are not summed up again.

    Args:
        remembered: how many calls.
    """

    def __init__(self, remembered: int) -> None:
        self._remembered = remembered
        self._known: list[tuple[list[tuple[weakref.ref[Tensor], int | None]], Conditions]] = []

    def of(self, arguments: Mapping[str, Any], x: Tensor, on_host: bool) -> Conditions:
        """Sum up what the samples of a call are conditioned on.

        Args:
            arguments: of the call, by name.
            x: its input.
            on_host: whether reading values waits for no device.
        """
        found: list[Tensor] = []
        others = False
        for name, value in arguments.items():
            if value is x or name in LEVEL_NAMES:
                continue
            if isinstance(value, Tensor):
                found.append(value)
            others = others or isinstance(value, (Mapping, list, tuple))
        if not others:
            for before, conditions in self._known:
                if conditions.values.shape[0] == x.shape[0] and _unchanged(found, before):
                    return conditions
        values = conditioning(arguments, len(x), x.device)
        conditions = Conditions(values, [tuple(row) for row in values.tolist()] if on_host else None)
        if not others:
            known = [(weakref.ref(each), version(each)) for each in found]
            self._known = [(known, conditions), *self._known[: self._remembered - 1]]
        return conditions


def _unchanged(tensors: Sequence[Tensor], before: Sequence[tuple[weakref.ref[Tensor], int | None]]) -> bool:
    """Whether these are the tensors of a call before, and nothing was written to them since."""
    if len(tensors) != len(before):
        return False
    for each, (ref, count) in zip(tensors, before, strict=True):
        if ref() is not each or count is None or count != version(each):
            return False
    return True


def conditioning(arguments: Mapping[str, Any], batch: int, device: torch.device) -> Tensor:
    """Sum up what each sample is conditioned on.

    Args:
        arguments: of the call, by name; the input itself and the noise level are left out.
        batch: B.
        device: of the result.

    Returns:
        (B, K) fp32, sums and sums of squares of every argument that has an entry a sample.
    """
    columns: list[Tensor] = []
    for source in _sources(arguments, batch):
        if isinstance(source, Tensor):
            rows = source.detach().reshape(batch, -1)
        else:
            items = [item.detach().float() for item in source]
            rows = torch.stack([torch.stack([item.sum(), item.square().sum()]) for item in items])
        wide = rows.to(device, torch.float32)
        columns += [wide.sum(1), wide.square().sum(1)]
    return torch.stack(columns, dim=1) if columns else torch.zeros(batch, 0, device=device)


def _sources(arguments: Mapping[str, Any], batch: int) -> list[Source]:
    """List what has an entry a sample, without the input and the noise level."""
    found: list[Source] = []
    skipped_input = False
    for name, value in arguments.items():
        if value is None or name in LEVEL_NAMES:
            continue
        before = len(found)
        _add(found, value, batch)
        if not skipped_input and len(found) > before and _is_input(value):
            skipped_input = True
            del found[before:]
    return found


def _is_input(value: Any) -> bool:
    first = value[0] if isinstance(value, list) else value
    return isinstance(first, Tensor) and first.is_floating_point() and (first.dim() > 1 or isinstance(value, list))


def _add(found: list[Source], value: Any, batch: int) -> None:
    """Add a tensor or a list that has an entry a sample, or those among the items of a mapping."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == batch and not value.is_complex():
            found.append(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            _add(found, item, batch)
    elif isinstance(value, (list, tuple)) and len(value) == batch and all(isinstance(item, Tensor) for item in value):
        found.append(value)
