"""Infer an adapter from the structure of a model for which none is declared.

The structure shows where the blocks are and which argument is the noise level. What the blocks return is learned in the
first call, which also checks the rest (`tokdyn.attach.inferred`). The token grid, and which arguments have one entry
per token, cannot be inferred, so that an inferred adapter serves DepthSkip and FeatureCache only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter

LEVEL_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_level")
"""Names that an argument for the noise level may have, in order of preference."""
VARYING_NAMES = ("audio_hidden_states", "audio_latents", "audio_timestep", "audio_sigma", "r_timestep", "timestep_r")
"""Names of further arguments that change from step to step."""
SIDE_PATHS = ("text", "context", "caption", "prompt", "refiner", "audio", "siglip", "clip", "encoder")
"""A list whose path contains one of these is taken not to be the main blocks, unless the model has no other list."""

_CONDITIONAL_FIRST = ("LuminaNextDiT2DModel", "OmniGenTransformer2DModel")  # in the batches of their pipelines


def infer(model: nn.Module) -> ModelAdapter | str:
    """Return an adapter inferred from the model's structure; or the reason, a clause for a message, if that fails."""
    paths = _block_lists(model)
    main = [path for path in paths if not any(part in path.lower() for part in SIDE_PATHS)] or paths
    if not main:
        return (
            "the model has no nn.ModuleList or nn.Sequential of two or more blocks of one class, each with weights of "
            "its own"
        )
    names = arguments(model)
    level = next((name for name in LEVEL_NAMES if name in names), None)
    return ModelAdapter(
        name=f"{type(model).__name__} (inferred)",
        classes=(type(model).__name__,),
        blocks=tuple(_declare(path, model.get_submodule(path)) for path in main),
        grid=None,
        level=None if level is None else GuessedLevel(level),
        varying=tuple(name for name in VARYING_NAMES if name in names),
        clock="assumed",
        guidance="cond_first" if type(model).__name__ in _CONDITIONAL_FIRST else "uncond_first",
        inferred=True,
    )


def _declare(path: str, blocks: Any) -> Blocks:
    """Declare a list of blocks whose first argument holds the tokens; `returns` is left to be learned."""
    return Blocks(path, tokens=arguments(blocks[0])[0], returns=(), products=None)


def arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments that a module's forward takes by position, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module).forward).parameters
    return tuple(name for name, parameter in parameters.items() if parameter.kind in kinds)[1:]


def _block_lists(model: nn.Module) -> list[str]:
    """Return the paths of the lists of blocks, in the order in which the model defines them."""
    paths: list[str] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in paths)
        if path and not nested and isinstance(module, (nn.ModuleList, nn.Sequential)) and _are_blocks(list(module)):
            paths.append(path)
    return paths


def _are_blocks(modules: list[nn.Module]) -> bool:
    """Tell whether these could be transformer blocks: two or more of one class, with weight matrices and arguments."""
    kinds = {type(module) for module in modules}
    if len(modules) < 2 or len(kinds) > 1 or kinds & {nn.ModuleList, nn.ModuleDict, nn.Sequential}:
        return False
    matrices = sum(parameter.dim() == 2 for parameter in modules[0].parameters())
    return matrices >= 2 and bool(arguments(modules[0]))


@dataclass
class GuessedLevel:
    """Reads the noise level from an argument of which only the name is known, by guessing its scale.

    Larger values are taken to be noisier. Integers are timesteps up to 1000. Floats are noise levels up to 1 until the
    first value above 1, and from then on timesteps up to 1000. An argument called sigma is a noise level until the
    first value above 1, and from then on the standard deviation s of the noise, whose level is `s / (1 + s)`.

    Attributes:
        name: the name of the argument.
        large: whether there has been an integer or a value above 1.
    """

    name: str
    large: bool = False

    def __call__(self, model: nn.Module, call: Arguments) -> Tensor | float:
        """Return the (B,) or () noise level of a call, where 1 is pure noise."""
        value: Any = torch.as_tensor(call[self.name])
        whole, value = not value.is_floating_point(), value.float()
        if torch.compiler.is_compiling() and not self.large and not whole:  # a graph cannot branch on a value
            return torch.where((value > 1).any(), self._scaled(value), value)
        self.large = self.large or whole or bool((value > 1).any())
        return self._scaled(value) if self.large else value

    def _scaled(self, value: Tensor) -> Tensor:
        return value / (1 + value) if self.name == "sigma" else value / 1000.0
