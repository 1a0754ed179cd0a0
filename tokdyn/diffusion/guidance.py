"""One model call per step: classifier-free guidance (arXiv 2207.12598) and Lite-CFG in a single batch."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokdyn.diffusion.objective import Objective
from tokdyn.errors import UnsupportedModelError

GuidanceChannels = Literal["all", "three"]


@dataclass(frozen=True)
class Denoised:
    """What one call said about a batch.

    Attributes:
        prediction: (B, C, H, W) noise or velocity, guided.
        variance: (B, C, H, W) learned variance of the conditional branch, or None.
        routing: the model's routing of the whole call, conditional branch first; None for models without one.
    """

    prediction: Tensor
    variance: Tensor | None
    routing: Any


class Branches:
    """The conditional and the unconditional branch of a batch, evaluated in one call, ``[cond, uncond]``.

    Args:
        model: takes ``(x, timestep=, class_labels=)`` and, when it routes tokens, ``tail_drop=``.
        objective: what it was trained with.
        labels: (B,) int64 class of each image.
        guidance: scale; 1 means none.
        channels: which channels of the prediction are guided; the variance never is.
        tail_drop: fraction of the kept tokens that the conditional branch drops.
        uncond_tail_drop: that of the unconditional branch.

    Raises:
        UnsupportedModelError: tokens are to be dropped in a model that has no such setting.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        labels: Tensor,
        guidance: float,
        channels: GuidanceChannels,
        tail_drop: float,
        uncond_tail_drop: float,
    ) -> None:
        self._model, self._objective = model, objective
        self._guidance, self._channels = guidance, channels
        self._labels = {False: labels, True: labels}
        if guidance != 1.0:
            self._labels[True] = torch.cat([labels, torch.full_like(labels, null_class(model))])
        self._budget: dict[bool, dict[str, Any]] = {False: {}, True: {}}
        if takes_tail_drop(model):
            both: float | Tensor = tail_drop
            if uncond_tail_drop != tail_drop:
                pair = torch.tensor([tail_drop, uncond_tail_drop], device=labels.device)
                both = pair.repeat_interleave(len(labels))
            self._budget = {False: {"tail_drop": tail_drop}, True: {"tail_drop": both}}
        elif tail_drop > 0 or (guidance != 1.0 and uncond_tail_drop > 0):
            raise cannot_drop(model)

    def __call__(self, x: Tensor, timestep: Tensor, guided: bool) -> Denoised:
        """Evaluate the model on ``x`` (B, C, H, W) at ``timestep``, a tensor without dimensions.

        When not ``guided``, the unconditional branch is not computed.
        """
        batch, labels = len(x), self._labels[guided]
        output = self._model(
            torch.cat([x, x]) if guided else x,
            timestep=timestep.expand(len(labels)),
            class_labels=labels,
            **self._budget[guided],
        )
        prediction, variance = self._objective.split(output.sample, x.shape[1])
        variance = None if variance is None else variance[:batch]
        if guided:
            prediction = self._guide(prediction[:batch], prediction[batch:])
        return Denoised(prediction, variance, getattr(output, "routing", None))

    def _guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        if self._channels == "all":
            return uncond + self._guidance * (cond - uncond)
        guided = uncond[:, :3] + self._guidance * (cond[:, :3] - uncond[:, :3])
        return torch.cat([guided, cond[:, 3:]], dim=1)


def cannot_drop(model: nn.Module) -> UnsupportedModelError:
    """What to say about a tail drop for a model that has none."""
    return UnsupportedModelError(
        f"{type(model).__name__} computes every token and cannot drop any: leave tail_drop and uncond_tail_drop at 0, "
        "or sample a model with dynamic chunking"
    )


def takes_tail_drop(model: nn.Module) -> bool:
    """Whether the model's forward has a ``tail_drop``; sees through ``torch.compile``."""
    return "tail_drop" in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def null_class(model: nn.Module) -> int:
    """The label that means no class: the one after the last."""
    return num_classes(model)


def num_classes(model: nn.Module) -> int:
    """How many classes the model knows, under our name or under that of diffusers."""
    config: Any = model.config
    count = config.get("num_classes", config.get("num_embeds_ada_norm"))
    if count is None:
        raise UnsupportedModelError(
            f"the configuration of {type(model).__name__} has no num_classes: sample a class-conditional model"
        )
    return int(count)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images or latents that the model makes."""
    config: Any = model.config
    size = config["sample_size"]
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(rows), int(columns)
