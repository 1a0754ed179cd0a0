"""Apply classifier-free guidance (arXiv 2207.12598) with both branches in one model call.

Lite-CFG (arXiv 2603.06351) gives the unconditional branch a larger tail drop than the conditional one.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.settings import GuidanceChannels
from tokdyn.errors import UnsupportedModelError
from tokdyn.ops.schedules import Curve, at


@dataclass(frozen=True)
class Denoised:
    """The model's output for one step.

    Attributes:
        prediction: (B, C, H, W) predicted noise or velocity, after guidance.
        variance: (B, C, H, W) learned variance of the conditional branch, or None.
        routing: the model's routing of all samples of the call, conditional branch first; None for models that do not
            route tokens.
    """

    prediction: Tensor
    variance: Tensor | None
    routing: Any


class Branches:
    """The guidance branches of a batch of B images, computed in one model call with the samples ``[cond, uncond]``.

    Args:
        model: takes ``(x, timestep=, class_labels=)`` and, if it routes tokens, ``tail_drop=``.
        objective: objective that the model was trained with.
        labels: (B,) int64 class of each image, on the model's device.
        guidance: guidance scale; 1 turns guidance off.
        channels: guide "all" channels of the prediction, or the first "three"; the variance is never guided.
        tail_drop: share of the kept tokens that the conditional branch drops: a number, or points (noise level, share)
            to interpolate between.
        uncond_tail_drop: as `tail_drop`, for the unconditional branch.

    Raises:
        UnsupportedModelError: a tail drop is set for a model that cannot drop tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        labels: Tensor,
        guidance: float,
        channels: GuidanceChannels,
        tail_drop: Curve,
        uncond_tail_drop: Curve,
    ) -> None:
        self._model, self._objective = model, objective
        self._guidance, self._channels = guidance, channels
        self._labels = {False: labels, True: labels}
        if guidance != 1.0:
            self._labels[True] = torch.cat([labels, torch.full_like(labels, null_class(model))])
        self._drops = tail_drop, uncond_tail_drop
        self._routes = takes_tail_drop(model)
        self._pairs: dict[tuple[float, float], Tensor] = {}
        if not self._routes and (drops(tail_drop) or (guidance != 1.0 and drops(uncond_tail_drop))):
            raise tail_drop_error(model)

    def _tail_drop_argument(self, guided: bool, level: float) -> dict[str, float | Tensor]:
        """Return the keyword argument ``tail_drop`` of a call: a number, or (2B,) if the branches differ.

        It is empty for models that do not route tokens. Tensors are cached, so that a step does not copy to the device.
        """
        if not self._routes:
            return {}
        cond, uncond = (at(drop, level) for drop in self._drops)
        if not guided or cond == uncond:
            return {"tail_drop": cond}
        if (cond, uncond) not in self._pairs:
            pair = torch.tensor([cond, uncond], device=self._labels[False].device)
            self._pairs[cond, uncond] = repeat(pair, "branch -> (branch batch)", batch=len(self._labels[False]))
        return {"tail_drop": self._pairs[cond, uncond]}

    def __call__(self, x: Tensor, timestep: Tensor, guided: bool, level: float = 1.0) -> Denoised:
        """Call the model for one step.

        Args:
            x: (B, C, H, W) noisy images.
            timestep: tensor without dimensions.
            guided: whether to compute the unconditional branch and apply guidance.
            level: noise level, which tail drops may depend on.
        """
        batch, labels = len(x), self._labels[guided]
        output = self._model(
            torch.cat([x, x]) if guided else x,
            timestep=timestep.expand(len(labels)),
            class_labels=labels,
            **self._tail_drop_argument(guided, level),
        )
        prediction, variance = self._objective.split(output.sample, x.shape[1])
        variance = None if variance is None else variance[:batch]
        if guided:
            prediction = self._guide(prediction[:batch], prediction[batch:])
        return Denoised(prediction, variance, getattr(output, "routing", None))

    def _guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Combine the predictions (B, C, H, W) of the branches."""
        if self._channels == "all":
            return uncond + self._guidance * (cond - uncond)
        guided = uncond[:, :3] + self._guidance * (cond[:, :3] - uncond[:, :3])
        return torch.cat([guided, cond[:, 3:]], dim=1)


def drops(tail_drop: Curve) -> bool:
    """Return whether a tail drop drops any token at any noise level."""
    return tail_drop > 0 if isinstance(tail_drop, int | float) else any(value > 0 for _, value in tail_drop)


def tail_drop_error(model: nn.Module) -> UnsupportedModelError:
    """Build the error for a tail drop on a model that cannot drop tokens."""
    return UnsupportedModelError(
        f"{type(model).__name__} computes every token and cannot drop any: leave tail_drop and uncond_tail_drop at 0, "
        "or sample a model with dynamic chunking."
    )


def takes_tail_drop(model: nn.Module) -> bool:
    """Return whether a model's forward takes ``tail_drop``; for a compiled model, that of the original."""
    return "tail_drop" in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def null_class(model: nn.Module) -> int:
    """Return the label of unconditional samples, the one after the last class."""
    return num_classes(model)


def num_classes(model: nn.Module) -> int:
    """Return the number of classes: `num_classes` of our models, `num_embeds_ada_norm` of diffusers'.

    Raises:
        UnsupportedModelError: the model is not class-conditional.
    """
    config: Any = model.config
    count = config.get("num_classes", config.get("num_embeds_ada_norm"))
    if count is None:
        raise UnsupportedModelError(
            f"The configuration of {type(model).__name__} has no num_classes: sample a class-conditional model."
        )
    return int(count)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the images or latents that the model generates."""
    config: Any = model.config
    size = config["sample_size"]
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(rows), int(columns)
