"""Say which way the time of a model runs: which value of its timestep argument is pure noise, and which the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, ModelAdapter
from tokdyn.adapters.infer import LEVEL_NAMES, arguments
from tokdyn.errors import InputError

Level = Callable[[nn.Module, Arguments], Tensor | float] | Sequence[float]
"""A function of the model and the arguments of a call that computes its noise levels; or two values of the timestep."""


@dataclass(frozen=True)
class ToldLevel:
    """Reads the noise level from a timestep whose values at both ends are known.

    Attributes:
        name: of the argument.
        noise: its value at pure noise.
        image: its value at the image.
    """

    name: str
    noise: float
    image: float

    def __call__(self, model: nn.Module, call: Arguments) -> Tensor | float:
        """Return the (B,) or () noise level of a call, where 1 is pure noise."""
        value = torch.as_tensor(call[self.name]).float()
        return (value - self.image) / (self.noise - self.image)


@dataclass(frozen=True)
class SaidLevel:
    """Computes the noise level by a function that the user gave.

    Attributes:
        compute: the function.
    """

    compute: Callable[[nn.Module, Arguments], Tensor | float]

    def __call__(self, model: nn.Module, call: Arguments) -> Tensor | float:
        """Return the (B,) or () noise level of a call, where 1 is pure noise."""
        return self.compute(model, call)


def with_level(adapter: ModelAdapter, model: nn.Module, level: Level | None) -> ModelAdapter:
    """Return the adapter of a model with a noise level that the user says, or itself if nothing is said.

    Args:
        adapter: of the model.
        model: whose forward has the timestep among its arguments.
        level: the values of the timestep at pure noise and at the image, such as (1.0, 0.0); or a function of the model
            and the arguments of a call that returns the noise levels, (B,) or (), where 1 is pure noise.

    Raises:
        InputError: it is neither, or the model has no argument that is known to be a timestep.
    """
    if level is None:
        return adapter
    if callable(level):
        return replace(adapter, level=SaidLevel(level), clock="known")
    try:
        noise, image = (float(value) for value in level)
    except (TypeError, ValueError):
        noise = image = 0.0
    if noise == image:
        raise InputError(
            f"level is {level!r}; give two values of the timestep, at pure noise and at the image, such as (1.0, 0.0), "
            "or a function of the model and the arguments of a call."
        )
    names = [name for name in LEVEL_NAMES if name in arguments(model)]
    if not names:
        raise InputError(
            f"{type(model).__name__} has no argument called {', '.join(LEVEL_NAMES)}; give level as a function of the "
            "model and the arguments of a call."
        )
    return replace(adapter, level=ToldLevel(names[0], noise, image), clock="known")


def told_level(adapter: ModelAdapter) -> Level | None:
    """Return what `with_level` was given: two values of the timestep, or a function; None if it was given nothing."""
    level = adapter.level
    if isinstance(level, SaidLevel):
        return level.compute
    return (level.noise, level.image) if isinstance(level, ToldLevel) else None
