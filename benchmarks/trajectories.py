"""Models with random weights, the calls of one trajectory, and how caches run through it, in turn."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tokdyn
from tokdyn.adapters import adapter_for

Calls = Sequence[dict[str, Any]]
"""The arguments of each step."""


@dataclass(frozen=True)
class Case:
    """A model and the calls of one trajectory.

    Attributes:
        model: never called itself.
        calls: the arguments of each step.
    """

    model: nn.Module
    calls: Calls

    def build(self) -> nn.Module:
        """Return a copy of the model that shares its weights: twenty copies of them would fill the memory."""
        return copy.deepcopy(self.model, {id(weight): weight for weight in self.model.parameters()})


@dataclass
class Side:
    """A model with a cache.

    Attributes:
        steps: begins a trajectory from an empty cache on, and calls the model once at each turn of the iterator.
        computed: numbers of the steps that computed the last block in the last trajectory.
        threshold: with which it ran; None where steps are listed.
    """

    steps: Callable[[], Iterator[None]]
    computed: list[int] = field(default_factory=list)
    threshold: float | None = None

    def run(self) -> None:
        """Call the model through a whole trajectory."""
        for _ in self.steps():
            pass


def moving(steps: int, *shape: int) -> list[Tensor]:
    """Latents of each step between noise and an image, nearer to it by unlike amounts."""
    noise, image = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return [torch.lerp(image, noise, level) for level in levels(steps)]


def levels(steps: int) -> list[float]:
    """Noise levels of the steps, from 1 downwards, closer together at both ends."""
    return [0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / steps))) for step in range(steps)]


def flux_calls(side: int, text: int = 32, steps: int = 25) -> Calls:
    """Calls of a Flux for one image of side x side tokens."""
    words, pooled = torch.randn(1, text, 64), torch.randn(1, 32)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    ids = torch.cat([torch.zeros(side * side, 1), places], dim=1)
    shared = {
        "encoder_hidden_states": words,
        "pooled_projections": pooled,
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }
    pairs = zip(moving(steps, 1, side * side, 16), levels(steps), strict=True)
    return [{"hidden_states": x, "timestep": torch.full((1,), level), **shared} for x, level in pairs]


def wan(blocks: int, heads: int, head: int = 96) -> nn.Module:
    """Build a Wan of diffusers with random weights."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head, num_layers=blocks, ffn_dim=4 * heads * head, freq_dim=256,
        text_dim=64, in_channels=16, out_channels=16,
    ).eval()  # fmt: skip


def wan_calls(frames: int, side: int, text: int = 32, steps: int = 25) -> Calls:
    """Calls of a Wan for one video of frames x side x side tokens."""
    words = torch.randn(1, text, 64)
    pairs = zip(moving(steps, 1, 16, frames, 2 * side, 2 * side), levels(steps), strict=True)
    return [
        {"hidden_states": x, "timestep": torch.full((1,), 1000 * level), "encoder_hidden_states": words}
        for x, level in pairs
    ]


def through(
    model: nn.Module,
    calls: Calls,
    begin: Callable[[], AbstractContextManager[Any]] = nullcontext,
    at_step: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> Side:
    """Run a model through the calls and note in which steps the last block is computed.

    Args:
        model: with its cache.
        calls: the arguments of each step.
        begin: opens the context of a trajectory, with an empty cache.
        at_step: opens the context of a step.
    """
    step = [0]
    side = Side(steps=lambda: iter(()))
    linear = [each for each in last_block(model).modules() if isinstance(each, nn.Linear)][-1]
    linear.register_forward_hook(lambda *_: side.computed.append(step[0]) if step[0] not in side.computed else None)

    @torch.no_grad()
    def steps() -> Iterator[None]:
        side.computed.clear()
        with begin():
            for step[0], arguments in enumerate(calls):
                with at_step(step[0]):
                    model(**arguments)
                yield

    side.steps = steps
    return side


def last_block(model: nn.Module) -> nn.Module:
    """Return the last block that a model calls."""
    return list(model.get_submodule(adapter_for(model).blocks[-1].path))[-1]


def told(model: nn.Module, calls: Calls) -> Side:
    """Run a wrapped model through the calls and tell it step and branch, as pipelines tell every cache."""

    @contextmanager
    def begin() -> Iterator[None]:
        with tokdyn.trajectory(model, steps=len(calls)) as found:
            here.append(found)
            found.branch = "cond"
            yield

    def at_step(step: int) -> AbstractContextManager[None]:
        here[-1].step = step
        return nullcontext()

    here: list[Any] = []
    return through(model, calls, begin, at_step)


def in_rounds(sides: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time all sides in every round, the order turning around, and return the milliseconds of each round by side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for index in range(-1, rounds):
            for name in sides if index % 2 else reversed(sides):
                start = time.perf_counter()
                sides[name]()
                if index >= 0:
                    times[name].append((time.perf_counter() - start) * 1e3)
    finally:
        gc.enable()
    return times


def step_by_step(mine: Side, peer: Side, rounds: int) -> list[float]:
    """Run two sides through their trajectories together, a step of each in turn, and compare their times.

    The machine's speed changes within seconds, so that whole trajectories one after the other differ by more than
    caches do.

    Returns:
        The time of `mine` over that of `peer` in each round, after one that does not count.
    """
    ratios, ended = [], object()
    gc.collect()
    gc.disable()
    try:
        for index in range(-1, rounds):
            walks, times, running, step = (mine.steps(), peer.steps()), [0.0, 0.0], {0, 1}, index
            while running:
                for place in sorted(running, reverse=step % 2 == 0):
                    start = time.perf_counter()
                    if next(walks[place], ended) is ended:
                        running.remove(place)
                    times[place] += time.perf_counter() - start
                step += 1
            if index >= 0:
                ratios.append(times[0] / times[1])
    finally:
        gc.enable()
    return ratios


def spent(side: Side) -> float:
    """FLOPs of a trajectory as torch counts them; a multiply-add is 2."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        side.run()
    return float(counter.get_total_flops())
