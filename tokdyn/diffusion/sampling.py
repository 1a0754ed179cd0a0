"""Sample images from a model with diffusers' schedulers, and record the cost of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import attachment_of, trajectory
from tokdyn.diffusion.guidance import Branches, image_shape, num_classes
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.randomness import initial_noise, step_generators
from tokdyn.diffusion.records import Generation, KeptLedger, StepRecord, StepState, StepTimer
from tokdyn.diffusion.schedulers import default_scheduler, open_scheduler
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import InputError
from tokdyn.ops.layers import weights_cast_once

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
    """Generate one image per label.

    An image depends on its label, its seed and the settings, not on the rest of its batch. The loop over the steps does
    not synchronise with the device.

    Args:
        model: a `tokdyn.models.DiT`, a `tokdyn.models.DCDiT` or any model that is called like them. It runs in
            evaluation mode, and is then put back into its former mode.
        sampler: the settings.
        objective: objective that the model was trained with.
        labels: (B,) classes; the number of classes is the label of unconditional samples.
        seeds: (B,) non-negative seeds.
        callback: called in every step; its time counts as time of the step.
        device: device to move the model to first; None does not move it.
        dtype: dtype of matrix products under autocast; None computes in the dtype of the weights.

    Returns:
        The images (B, C, H, W), pixels or latents as the model generates them, and a record of each step.

    Raises:
        InputError: there are not as many seeds as labels, a seed is negative, or a class does not exist.
        RecipeError: the scheduler cannot sample this objective, or not in so many steps.
        UnsupportedModelError: a tail drop is set for a model that cannot drop tokens.
    """
    model = model if device is None else model.to(device)
    parameter = next(model.parameters())
    device, state_dtype = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
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
    x = initial_noise(seed_list, image_shape(model)).to(device, state_dtype)
    extra = {"generator": step_generators(seed_list, device)} if name == "ddpm" else {}
    timesteps, levels = scheduler.timesteps.to(device), _levels(objective, scheduler.timesteps)
    guided = [sampler.guided_at(level) for level in levels]
    ledger, timer = KeptLedger(), StepTimer(device)
    telling = nullcontext() if attachment_of(model) is None else trajectory(model, len(timesteps))
    with _evaluating(model), torch.no_grad(), _autocast(device, dtype), weights_cast_once(), telling as here:
        timer.mark()
        for index, timestep in enumerate(timesteps):
            if here is not None:
                here.step = index
            batch_timestep = timestep.expand(len(x))
            denoised = network(x.to(parameter.dtype), timestep, guided[index], levels[index])
            prediction = denoised.prediction.to(state_dtype)
            if sampler.clip:
                clean = objective.predict_x0(prediction, x, batch_timestep).clamp(-1.0, 1.0)
                prediction = objective.prediction_for(clean, x, batch_timestep)
            if callback is not None:
                callback(StepState(index, batch_timestep, levels[index], x, prediction, denoised.routing, objective))
            if name == "ddpm" and denoised.variance is not None:
                prediction = torch.cat([prediction, denoised.variance.to(state_dtype)], dim=1)
            x = scheduler.step(prediction, scheduler.timesteps[index], x, return_dict=False, **extra)[0]
            ledger.add(denoised.routing)
            timer.mark()
    reset_cache: Any = getattr(model, "_reset_stateful_cache", None)
    if reset_cache is not None:  # as diffusers' pipelines do at the end of a trajectory
        reset_cache()
    columns = scheduler.timesteps.double().tolist(), levels, guided, timer.seconds(), ledger.split(guided, len(x))
    records = [StepRecord(index, *row) for index, row in enumerate(zip(*columns, strict=True))]
    return Generation(x.float().clone(), records)


def _levels(objective: Objective, timesteps: Tensor) -> list[float]:
    """Return the noise level of each timestep."""
    alpha, sigma = objective.scales(timesteps)
    levels: list[float] = (sigma / (alpha + sigma)).tolist()
    return levels


def _checked(
    seeds: Tensor | Sequence[int], labels: Tensor | Sequence[int], classes: int
) -> tuple[list[int], list[int]]:
    """Return seeds and labels as lists; raise an InputError if they are not valid for a model with so many classes."""
    seed_list, label_list = [int(seed) for seed in seeds], [int(label) for label in labels]
    if len(seed_list) != len(label_list) or not seed_list:
        raise InputError(f"Got {len(label_list)} labels and {len(seed_list)} seeds: give one of each per image.")
    if min(seed_list) < 0:
        raise InputError(f"Seed {min(seed_list)} is negative: give seeds of 0 or more.")
    wrong = [label for label in label_list if not 0 <= label <= classes]
    if wrong:
        raise InputError(f"Class {wrong[0]} does not exist: give 0 to {classes - 1}, or {classes} for no class.")
    return seed_list, label_list


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Return a context in which the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return an autocast context for the whole loop, in which weights are cast once, not in every step.

    Autocast caches cast weights under `torch.no_grad`, but not in inference mode, so the loop uses the former.
    """
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None and dtype != torch.float32)
