"""Measure where the FLOPs and the time of a model go, by part."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokdyn.diffusion.guidance import image_shape
from tokdyn.diffusion.randomness import initial_noise
from tokdyn.sample.job import Job
from tokdyn.trace.timing import Stopwatch

_ROUNDS = 3
_TIMESTEPS = (0.85, 0.5, 0.15)  # shares of the range of timesteps
CHUNKING, REST = "router and chunking", "rest"
_FLOPS = {
    "embedders": ("embed",),
    "encoder": ("encoder",),
    CHUNKING: ("router", "residual", "dechunk"),
    "blocks": ("adaLN", "projections", "attention", "mlp", "cross-attention"),
    "decoder": ("decoder",),
    "head": ("head",),
}
"""Parts of `tokdyn.cost` in each part of a report."""
_MODULES = {
    "x_embedder": "embedders", "t_embedder": "embedders", "y_embedder": "embedders", "encoder": "encoder",
    "blocks": "blocks", "decoder": "decoder", "final_layer": "head",
}  # fmt: skip
NOTE = (
    "Per step and image, guidance branches included; times are means over three noise levels. "
    "What runs between the modules of a DC-DiT counts as router and chunking."
)


@dataclass(frozen=True)
class PartCost:
    """The cost of a part of a model in one step, per image, guidance branches included.

    Attributes:
        name: name of the part.
        gflops: 1e9 FLOPs; a multiply-add is 2 FLOPs.
        milliseconds: time.
    """

    name: str
    gflops: float
    milliseconds: float


def part_costs(gflops: Mapping[str, float], milliseconds: Mapping[str, float], guided: bool) -> tuple[PartCost, ...]:
    """Join FLOPs and times by part.

    Args:
        gflops: 1e9 FLOPs of a step by part of `tokdyn.cost`, both guidance branches included.
        milliseconds: time of one call by part, from `time_parts`.
        guided: whether a step calls the model on two branches.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    place = {part: name for name, parts in _FLOPS.items() for part in parts}
    for part, value in gflops.items():
        spent[place.get(part, "methods")] += value
    times = defaultdict(float, milliseconds)
    if CHUNKING in spent:
        times[CHUNKING] += times.pop(REST, 0.0)
    branches = 2 if guided else 1
    costs = [PartCost(name, spent[name], branches * times[name]) for name in (*_FLOPS, "methods", REST)]
    return tuple(cost for cost in costs if cost.gflops or cost.milliseconds)


def time_parts(job: Job, batch: int) -> dict[str, float]:
    """Time the parts of a model in calls at three timesteps, in ms per image: means of the medians of three calls each.

    Args:
        job: the run.
        batch: images in the call.

    Returns:
        Times by part. What runs outside of the parts is "rest".
    """
    model, device = job.model, job.device
    labels = torch.tensor([job.classes[index % len(job.classes)] for index in range(batch)], device=device)
    found: defaultdict[str, float] = defaultdict(float)
    with torch.no_grad(), torch.autocast(device.type, job.dtype or torch.bfloat16, enabled=job.dtype is not None):
        for place, share in enumerate(_TIMESTEPS):
            timestep = torch.full((batch,), int(share * job.objective.num_train_timesteps), device=device)
            rounds = []
            for number in range(1 + _ROUNDS):  # of other images each, of which no method can reuse anything
                first = (place * (1 + _ROUNDS) + number) * batch
                x = initial_noise(list(range(first, first + batch)), image_shape(model))
                x = x.to(device, next(model.parameters()).dtype)
                rounds.append(_time_once(model, (x, timestep, labels), device))
            for name in {name for row in rounds for name in row}:
                median = statistics.median(row.get(name, 0.0) for row in rounds[1:])
                found[name] += median / batch / len(_TIMESTEPS)
    return dict(found)


def _time_once(model: nn.Module, inputs: tuple[Any, ...], device: torch.device) -> dict[str, float]:
    """Call a model once, and return the ms of each part."""
    watches: list[tuple[str, Stopwatch]] = []
    running: list[Stopwatch] = []

    def begin(*_: Any) -> None:
        running.append(Stopwatch(device))

    with ExitStack() as stack:
        for name, part in _MODULES.items():
            found = getattr(model, name, None)
            for module in found if isinstance(found, nn.ModuleList) else [found] if found is not None else []:

                def end(*_: Any, part: str = part) -> None:
                    watch = running.pop()
                    watch.stop()
                    watches.append((part, watch))

                for hook in (module.register_forward_pre_hook(begin), module.register_forward_hook(end)):
                    stack.callback(hook.remove)
        whole = Stopwatch(device)
        model(*inputs)
        whole.stop()
    times: defaultdict[str, float] = defaultdict(float)
    for part, watch in watches:
        times[part] += 1e3 * (watch.seconds or 0.0)
    times[REST] = max(0.0, 1e3 * (whole.seconds or 0.0) - sum(times.values()))
    return dict(times)
