"""Draw the randomness of a micro-batch, and compute its loss.

A micro-batch is the part of a training step's batch that one process computes at once. Drawing and computing are apart,
so that the loss is a pure function of the model and the draws.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.diffusion.objective import Noised, Objective
from tokdyn.division import current
from tokdyn.draws import uniform
from tokdyn.ops import ratio_loss
from tokdyn.seeds import Draw
from tokdyn.tokens import Routing
from tokdyn.upcycling.distillation import LossTerms
from tokdyn.upcycling.phases import PhaseBatch


@dataclass(frozen=True)
class Draws:
    """The random draws for a micro-batch of B images.

    Attributes:
        noised: Noisy images, their timesteps and the noise.
        labels: (B,) int64 classes, some of them replaced by the null class.
        tail_drop: Share of the kept tokens to drop: a number, or a tensor (B,).
    """

    noised: Noised
    labels: Tensor
    tail_drop: float | Tensor = 0.0

    def slice(self, part: slice) -> Draws:
        """Return the draws of some of the samples."""
        tensors = {name: value[part] for name, value in vars(self.noised).items()}
        drop = self.tail_drop[part] if isinstance(self.tail_drop, Tensor) else self.tail_drop
        return Draws(replace(self.noised, **tensors), self.labels[part], drop)


@dataclass(frozen=True)
class RatioTerm:
    """The settings of a chunking model's ratio loss, which holds the kept share at 1/N.

    Attributes:
        target: N: one of N tokens should be kept.
        ratio_weight: Weight of the ratio loss.
        ratio_group: Number of consecutive images over which the loss averages the kept share; None averages over the
            batch of the step.
    """

    target: float
    ratio_weight: float
    ratio_group: int | None


@dataclass(frozen=True)
class StepLoss:
    """The result of a micro-step.

    Attributes:
        loss: Scalar to differentiate.
        metrics: Scalars without gradient, on the device: "loss" (the diffusion loss); for a chunking model "ratio" (the
            ratio loss), "probability" (mean boundary probability), "kept" (kept share after tail drop) and
            "natural_kept" (before it); for an upcycled model "teacher", "output", "complete" and the losses of its
            methods, as far as its phase has them.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def draw(
    objective: Objective,
    x: Tensor,
    labels: Tensor,
    null_class: int,
    label_dropout: float,
    keys: Tensor,
    tail_drop: float | Tensor = 0.0,
) -> Draws:
    """Draw timesteps, noise and label dropout of each image from its own key.

    Args:
        objective: Draws the timesteps and the noise.
        x: (B, C, H, W) clean images.
        labels: (B,) int64 classes.
        null_class: The label of unconditional samples.
        label_dropout: Probability that a label is replaced by the null class.
        keys: (B,) int64, from `tokdyn.seeds.image_keys`.
        tail_drop: Copied into the result. It is drawn by `tokdyn.train.schedule.tail_drop`, because one for a whole
            step belongs to no image.
    """
    keys = keys.to(x.device)
    noised = objective.add_own_noise(x, keys)
    dropped = uniform(keys, 1, Draw.LABEL)[:, 0] < label_dropout
    if isinstance(tail_drop, Tensor):
        tail_drop = tail_drop.to(x.device)
    return Draws(noised, torch.where(dropped, null_class, labels), tail_drop)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context to run a forward pass in: bfloat16 autocast for "bf16", no autocast for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def kept_share(routing: Routing, group: int | None) -> Tensor | None:
    """Return the mean kept share (B,), before tail drop, of the group of the step's batch that each image belongs to.

    Args:
        routing: Of the images of the part that is computed, see `tokdyn.division`.
        group: Consecutive images of a group; None is the whole batch.

    Returns:
        None where no part of a batch is computed, but a batch of its own.
    """
    part = current()
    return None if part is None else part.means("kept", routing.natural_keep.float().mean(dim=1), group)


def micro_step(
    model: nn.Module,
    objective: Objective,
    draws: Draws,
    precision: str,
    chunking: RatioTerm | None = None,
    phase_batch: PhaseBatch | None = None,
) -> StepLoss:
    """Run the model on a micro-batch and compute its loss.

    Args:
        model: A DiT, a DCDiT or a `tokdyn.upcycling.Distillation`, possibly in a data-parallel wrapper.
        objective: Computes the diffusion loss.
        draws: The micro-batch.
        precision: "bf16" or "fp32".
        chunking: The settings of the ratio loss, for chunking models.
        phase_batch: The loss weights of the upcycling phase and the samples on a fixed plan, for a `Distillation`.
    """
    noised = draws.noised
    arguments: dict[str, Any] = {"timestep": noised.timestep, "class_labels": draws.labels}
    if chunking is not None:
        arguments["tail_drop"] = draws.tail_drop
    compared: dict[str, Tensor] = {}
    complete: Tensor | None = None
    with autocast(noised.x_t.device, precision):
        if phase_batch is None:
            output = model(noised.x_t, **arguments)
        else:
            phase, on_fixed_plan = phase_batch.phase, phase_batch.on_fixed_plan.to(noised.x_t.device)
            terms = LossTerms(phase.teacher > 0, phase.output > 0, phase.complete > 0)
            output, complete, compared = model(terms, on_fixed_plan, noised.x_t, **arguments)
    diffusion = objective.loss(output.sample, noised).mean()
    metrics = {"loss": diffusion.detach()}
    loss = diffusion
    if phase_batch is not None:
        if complete is not None:
            compared["complete"] = objective.loss(complete, noised).mean()
        metrics |= {name: value.detach() for name, value in compared.items()}
        loss = phase_batch.phase.diffusion * diffusion
        loss = sum((phase_batch.weight(name) * value for name, value in compared.items()), loss)
    if chunking is None:
        return StepLoss(loss, metrics)
    routing = output.routing
    group = chunking.ratio_group
    share = kept_share(routing, group)
    ratio = ratio_loss(routing.probability, routing.natural_keep, chunking.target, group, share)
    tokens = routing.keep.shape[1]
    metrics |= {
        "ratio": ratio.detach(),
        "probability": routing.probability.detach().float().mean(),
        "kept": routing.kept.float().mean() / tokens,
        "natural_kept": routing.natural_kept.float().mean() / tokens,
    }
    return StepLoss(loss + chunking.ratio_weight * ratio, metrics)
