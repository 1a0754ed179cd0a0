"""What tests of wrapped models share: building tiny models without a download, and calling them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokdyn
from tokdyn import FeatureCache
from tokdyn.adapters import ADAPTERS, adapter_for
from tokdyn.attach import unsupported
from tokdyn.methods import Method
from tokdyn.ops.caching import relative_change

SHARED = {"img_ids", "txt_ids", "image_rotary_emb", "added_cond_kwargs", "num_frames", "height", "width"}
"""Arguments that have no batch."""


@dataclass(frozen=True)
class Tiny:
    """How to build a model and what to call it with.

    Attributes:
        build: makes the model.
        inputs: keyword arguments for a batch of that size.
        clock: name of the timestep, its value at pure noise and at the image; None where there is none.
        shared: names of arguments that have no batch, beside `SHARED`.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    clock: tuple[str, float, float] | None = ("timestep", 1000.0, 0.0)
    shared: frozenset[str] = frozenset()

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
    """A model of diffusers with random weights; the test is skipped where diffusers is too old to have it."""
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
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


def moved(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a call with latents that have moved, of every sample by another distance."""
    name, x = next(iter(inputs.items()))
    generator = torch.Generator().manual_seed(5)
    later = [each + 0.1 * 2**place * torch.randn(each.shape, generator=generator) for place, each in enumerate(x)]
    return {**inputs, name: later if isinstance(x, list) else torch.stack(later)}


def assert_a_cache_compares_what_attention_gets(build: Callable[[], Any], before: Any, after: Any) -> None:
    """A sample reuses its blocks if the input of the first attention changed by less than the threshold.

    Args:
        build: makes a model.
        before: arguments of a call for two samples.
        after: the same at a later step.
    """
    model, seen = build(), []
    blocks = adapter_for(model).blocks[0]
    first = next(iter(model.get_submodule(blocks.path).children()))
    first.get_submodule(blocks.attention[0]).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    model(**before)
    model(**after)
    low, high = sorted(relative_change(seen[1], seen[0]).tolist())
    assert 0 < 1.05 * low < high
    for threshold, reused in ((0.9999 * low, 0), (1.0001 * low, 1), (0.9999 * high, 1), (1.0001 * high, 2)):
        model = tokdyn.wrap(build(), [FeatureCache(threshold=threshold)])
        model(**before)
        model(**after)
        assert [call.reused for call in tokdyn.stats(model).calls] == [0, reused]


def shallow(model: nn.Module, depth: int = 2) -> nn.Module:
    """Leave a model only its last blocks, `depth` in all: tracing one for torch.compile takes half a second."""
    stacks = [model.get_submodule(blocks.path) for blocks in adapter_for(model).blocks]
    for stack in stacks:
        del stack[: -(depth // len(stacks))]
    return model


def count_from_now() -> None:
    """Hide what there is from the garbage collector: looking through the objects of earlier tests takes seconds."""
    gc.freeze()


def elements_in_memory() -> int:
    """Count the elements of all tensors made since `count_from_now`, once for all views of one memory."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter) and each.layout == torch.strided and not each.is_meta:
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes() // each.element_size()
    return sum(found.values())
