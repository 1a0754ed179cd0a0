"""Draws images from a model with diffusers' schedulers, and records what each step cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tokdyn.diffusion.clock import StepClock
from tokdyn.diffusion.guidance import Branches, GuidanceChannels, image_shape, num_classes
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.randomness import initial_noise, step_generators
from tokdyn.diffusion.records import Generation, KeptLedger, StepRecord, StepState
from tokdyn.diffusion.schedulers import SchedulerName, default_scheduler, open_scheduler
from tokdyn.errors import InputError
from tokdyn.ops.layers import weights_cast_once
from tokdyn.ops.schedules import Curve, check_curve


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise ValueError("two noise levels are needed, low then high, between 0 and 1")
    return interval


Steps = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _shares(curve: Curve) -> Curve:
    check_curve(curve, 0.0, 1.0)
    return curve


Points = Annotated[tuple[tuple[float, float], ...], AfterValidator(_shares)]
"""Points (noise level, share of the kept tokens)."""
Drop = Share | Points
"""A share of the kept tokens, or one that changes with the noise level."""
GuidanceScale = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Interval = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Sampler(BaseModel):
    """How images are drawn.

    Attributes:
        scheduler: ``ddpm``, ``ddim`` or ``dpm`` for noise, ``euler`` for flow; None means ddpm or euler.
        steps: model calls per image.
        guidance: scale of classifier-free guidance; 1 means none, and then no unconditional branch is computed.
        guidance_channels: ``all`` channels of the prediction, or the first ``three`` as the public DiT code guides.
        guidance_interval: noise levels (see ``tokdyn.diffusion.objective``), ends included, in which guidance acts
            (arXiv 2404.07724); outside of it the unconditional branch is not computed.
        tail_drop: fraction of the kept tokens to drop, the least certain first; or points (noise level, fraction)
            between which it runs in straight lines, 1 being pure noise.
        uncond_tail_drop: the same for the unconditional branch (Lite-CFG, arXiv 2603.06351); None means as the other.
        clip: clamp each prediction of the clean image to [-1, 1]: right for pixels, wrong for latents.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheduler: SchedulerName | None = None
    steps: Steps = 250
    guidance: GuidanceScale = 1.0
    guidance_channels: GuidanceChannels = "all"
    guidance_interval: Interval = (0.0, 1.0)
    tail_drop: Drop = 0.0
    uncond_tail_drop: Drop | None = None
    clip: bool = False

    def guided_at(self, level: float) -> bool:
        """Whether guidance acts at a noise level."""
        return self.guidance != 1.0 and self.guidance_interval[0] <= level <= self.guidance_interval[1]


Callback = Callable[[StepState], None]


def generate(
    model: nn.Module,
    sampler: Sampler,
    objective: Objective,
    labels: Tensor | Sequence[int],
    seeds: Tensor | Sequence[int],
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Generation:
    """Draw one image per label.

    An image depends on its own label and seed and on the settings, not on its batch. The loop itself never waits for
    the device.

    Args:
        model: a :class:`tokdyn.models.DiT`, :class:`tokdyn.models.DCDiT` or anything that is called like them.
        sampler: how to draw.
        objective: what the model was trained with.
        labels: (B,) classes; ``num_classes`` means no class.
        seeds: (B,) non-negative seeds.
        callback: called at every step; what it does is part of the time of that step.
        device: moves the model there first; None leaves it where it is.
        dtype: computes the model under autocast in this type; None means in the type of its weights.

    Raises:
        InputError: labels and seeds that do not fit each other or the model.
        RecipeError: a scheduler or number of steps that does not fit the objective.
        UnsupportedModelError: tokens are to be dropped in a model that computes all of them.
    """
    model = model if device is None else model.to(device)
    parameter = next(model.parameters())
    device, trajectory = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
    seed_list, label_list = _checked(seeds, labels, num_classes(model))
    name = sampler.scheduler or default_scheduler(objective)
    scheduler = open_scheduler(name, sampler.steps, objective)
    unconditional = sampler.tail_drop if sampler.uncond_tail_drop is None else sampler.uncond_tail_drop
    network = Branches(
        model,
        objective,
        torch.tensor(label_list, device=device),
        sampler.guidance,
        sampler.guidance_channels,
        sampler.tail_drop,
        unconditional,
    )
    x = initial_noise(seed_list, image_shape(model)).to(device, trajectory)
    extra = {"generator": step_generators(seed_list, device)} if name == "ddpm" else {}
    timesteps, levels = scheduler.timesteps.to(device), _levels(objective, scheduler.timesteps)
    guided = [sampler.guided_at(level) for level in levels]
    ledger, clock = KeptLedger(), StepClock(device)
    with _evaluating(model), torch.no_grad(), _autocast(device, dtype), weights_cast_once():
        clock.mark()
        for index, timestep in enumerate(timesteps):
            told = timestep.expand(len(x))
            denoised = network(x.to(parameter.dtype), timestep, guided[index], levels[index])
            prediction = denoised.prediction.to(trajectory)
            if sampler.clip:
                clean = objective.predict_x0(prediction, x, told).clamp(-1.0, 1.0)
                prediction = objective.prediction_for(clean, x, told)
            if callback is not None:
                callback(StepState(index, told, levels[index], x, prediction, denoised.routing, objective))
            if name == "ddpm" and denoised.variance is not None:
                prediction = torch.cat([prediction, denoised.variance.to(trajectory)], dim=1)
            x = scheduler.step(prediction, scheduler.timesteps[index], x, return_dict=False, **extra)[0]
            ledger.add(denoised.routing)
            clock.mark()
    forget: Any = getattr(model, "_reset_stateful_cache", None)
    if forget is not None:  # as diffusers' pipelines do when they have made their images
        forget()
    columns = scheduler.timesteps.double().tolist(), levels, guided, clock.seconds(), ledger.split(guided, len(x))
    records = [StepRecord(index, *row) for index, row in enumerate(zip(*columns, strict=True))]
    return Generation(x.float().clone(), records)


def _levels(objective: Objective, timesteps: Tensor) -> list[float]:
    alpha, sigma = objective.scales(timesteps)
    levels: list[float] = (sigma / (alpha + sigma)).tolist()
    return levels


def _checked(
    seeds: Tensor | Sequence[int], labels: Tensor | Sequence[int], classes: int
) -> tuple[list[int], list[int]]:
    """Seeds and labels as lists, checked before anything is computed."""
    seed_list, label_list = [int(seed) for seed in seeds], [int(label) for label in labels]
    if len(seed_list) != len(label_list) or not seed_list:
        raise InputError(f"got {len(label_list)} labels and {len(seed_list)} seeds: give one of each per image")
    if min(seed_list) < 0:
        raise InputError(f"seed {min(seed_list)} is negative: seeds are 0 or more")
    wrong = [label for label in label_list if not 0 <= label <= classes]
    if wrong:
        raise InputError(f"class {wrong[0]} does not exist: the model knows 0 to {classes - 1}, and {classes} for none")
    return seed_list, label_list


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration, then whatever it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Entered once around the loop, so that weights are cast once and not at every step; not so in inference mode."""
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None and dtype != torch.float32)
