"""An adapter for a model that none is declared for, read off its structure.

What can be read is where the blocks are and which argument is the noise level. What blocks return is learned when they
first run, and a model that turns out to be something else is refused then (`tokdyn.attach.inferred`). Where tokens lie
on a grid and what follows them cannot be read, so such an adapter is good for skipping and caching only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, ModelAdapter, Stack

CLOCKS = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")
"""Names of a noise level among the arguments of a model, in order of preference."""
ASIDE = ("text", "context", "caption", "prompt", "refiner", "audio", "siglip", "clip", "encoder")
"""Words in the path of a list that holds something other than the main blocks, where there is another list."""


def infer(model: nn.Module) -> ModelAdapter | str:
    """An adapter for this model, or what was looked for in vain."""
    paths = _lists(model)
    main = [path for path in paths if not any(word in path.lower() for word in ASIDE)] or paths
    if not main:
        return (
            "looked for an nn.ModuleList or nn.Sequential of two or more blocks of one class, each with "
            "weights of its own, and there is none"
        )
    stacks = tuple(_stack(path, model.get_submodule(path)) for path in main)
    names = arguments(model)
    clock = next((name for name in CLOCKS if name in names), None)
    return ModelAdapter(
        name=f"{type(model).__name__} (inferred)",
        classes=(type(model).__name__,),
        stacks=stacks,
        grid=None,
        level=None if clock is None else GuessedLevel(clock),
        inferred=True,
    )


def _stack(path: str, blocks: Any) -> Stack:
    """What can be said of a list of blocks before they run."""
    return Stack(path, tokens=arguments(blocks[0])[0], returns=(), products=None)


def arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that a module's forward takes by position, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module).forward).parameters
    return tuple(name for name, each in parameters.items() if each.kind in kinds)[1:]


def _lists(model: nn.Module) -> list[str]:
    """Paths of the lists of blocks, in the order in which the model defines them."""
    found: list[str] = []
    for path, part in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path and not inside and isinstance(part, (nn.ModuleList, nn.Sequential)) and _alike(list(part)):
            found.append(path)
    return found


def _alike(parts: list[nn.Module]) -> bool:
    """Whether these could be the blocks of a transformer."""
    kinds = {type(part) for part in parts}
    if len(parts) < 2 or len(kinds) > 1 or kinds & {nn.ModuleList, nn.ModuleDict, nn.Sequential}:
        return False
    matrices = sum(parameter.dim() == 2 for parameter in parts[0].parameters())
    return matrices >= 2 and bool(arguments(parts[0]))


@dataclass
class GuessedLevel:
    """The noise level of an argument of which only the name is known.

    Large is noisy. Whole numbers, and numbers in a call after one that was above 1, run to 1000; other numbers run to
    1. A sigma above 1 is taken as the deviation s of noise that is added to the image; its level is s / (1 + s).

    Attributes:
        name: of the argument.
        large: a number above 1 has been seen.
    """

    name: str
    large: bool = False

    def __call__(self, model: nn.Module, call: Arguments) -> Tensor | float:
        """(B,) or () level, 1 is pure noise."""
        value: Any = torch.as_tensor(call[self.name])
        whole, value = not value.is_floating_point(), value.float()
        if torch.compiler.is_compiling() and not self.large and not whole:  # nothing can be read there
            return torch.where((value > 1).any(), self._scaled(value), value)
        self.large = self.large or whole or bool((value > 1).any())
        return self._scaled(value) if self.large else value

    def _scaled(self, value: Tensor) -> Tensor:
        return value / (1 + value) if self.name == "sigma" else value / 1000.0
