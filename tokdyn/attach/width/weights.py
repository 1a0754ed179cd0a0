"""Whether a weight is still what it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SAMPLES = 16  # numbers of each weight that are compared: what writes to .data leaves no other trace


@dataclass(frozen=True)
class Seen:
    """A weight as it was when it was sliced.

    Attributes:
        weight: itself.
        version: counts what was done to it in place.
        address: of its numbers.
        few: some of its numbers, as they are now.
        were: the same as they were.
    """

    weight: Tensor
    version: int
    address: int
    few: Tensor
    were: Tensor

    @staticmethod
    def of(weight: Tensor) -> Seen:
        """The weight as it is."""
        few = _few(weight)
        return Seen(weight, weight._version, weight.data_ptr(), few, few.clone())

    def same(self, weight: Tensor) -> bool:
        """Whether nothing has replaced, moved or changed it, writes to `.data` excepted."""
        return weight is self.weight and weight._version == self.version and weight.data_ptr() == self.address


def _few(weight: Tensor) -> Tensor:
    """Some of the numbers of a weight, from all over it."""
    flat = weight.detach().view(-1) if weight.is_contiguous() else weight.detach()[0].reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES]


def weights_of(module: nn.Module) -> list[Tensor]:
    """The parameters of a module itself."""
    return [value for value in module._parameters.values() if value is not None]


def untouched(seen: Iterable[Seen]) -> bool:
    """Whether none of some weights was written to through `.data`; accelerators are waited for once."""
    places: dict[torch.device, list[Seen]] = {}
    for each in seen:
        places.setdefault(each.few.device, []).append(each)
    return all(
        torch.equal(torch.cat([each.few for each in here]), torch.cat([each.were for each in here]))
        for here in places.values()
    )
