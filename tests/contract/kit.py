"""What tests of wrapped models share: building tiny models without a download, and calling them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters import ADAPTERS
from tokdyn.attach import unsupported
from tokdyn.methods import Method

SHARED = {"img_ids", "txt_ids", "image_rotary_emb", "added_cond_kwargs", "num_frames", "height", "width"}
"""Arguments that have no batch."""


@dataclass(frozen=True)
class Tiny:
    """How to build a model and what to call it with.

    Attributes:
        build: makes the model.
        inputs: keyword arguments for a batch of that size.
        clock: name of the timestep, its value at pure noise and at the image; None where there is none.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    clock: tuple[str, float, float] | None = ("timestep", 1000.0, 0.0)

    def at(self, batch: int, level: float) -> dict[str, Tensor]:
        """The timestep argument at a noise level."""
        if self.clock is None:
            return {}
        name, noise, image = self.clock
        value = image + (noise - image) * level
        given = self.inputs(batch)[name]
        return {name: torch.full_like(given, round(value) if not given.is_floating_point() else value)}


def one_of(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of one sample of a batch."""
    return {name: value if name in SHARED else value[i : i + 1] for name, value in inputs.items()}


def randomized(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model in evaluation mode, with every constant parameter replaced by small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.std(correction=0) == 0:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def of_diffusers(name: str, **config: Any) -> nn.Module:
    """A model of diffusers with random weights."""
    import diffusers

    torch.manual_seed(0)
    return randomized(getattr(diffusers, name)(**config))


def ids(rows: int, columns: int) -> Tensor:
    """(N, 3) position ids of Flux."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.zeros(len(places), 1), places], dim=1)


def latents(batch: int, *shape: int) -> Tensor:
    """(B, ...) white noise whose samples do not depend on how many there are."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(batch)]
    return torch.stack(rows)


def classes(batch: int) -> Tensor:
    return torch.arange(batch) % 10


def works(name: str, methods: Sequence[Method]) -> bool:
    """Whether all these methods can be attached to a model of that class, as `wrap` sees it."""
    adapter = next(adapter for adapter in ADAPTERS if name in adapter.classes)
    return all(unsupported(adapter, method) is None for method in methods)


def sample(output: Any) -> Tensor:
    """(B, ...) what a model predicts."""
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output, tuple) else output.sample
    return found if isinstance(found, Tensor) else torch.stack(list(found))
