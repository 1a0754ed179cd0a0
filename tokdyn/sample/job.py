"""Prepare a sampling job: load the model, and settle and check everything before the first image is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokdyn.attach import attachment_of, unwrap
from tokdyn.diffusion.guidance import tail_drop_error, takes_tail_drop
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.schedulers import default_scheduler, open_scheduler
from tokdyn.diffusion.settings import SchedulerName
from tokdyn.errors import UnsupportedModelError
from tokdyn.files import require_folder
from tokdyn.host import open_device, product_type
from tokdyn.pipelines import load
from tokdyn.report.decoding import Decoder, open_decoder
from tokdyn.sample.config import SampleConfig
from tokdyn.sample.labels import class_name, class_numbers
from tokdyn.sample.loading import ModelInfo, load_model


@dataclass(frozen=True)
class Job:
    """A sampling job that is ready to start.

    Attributes:
        config: the settings as the user gave them.
        model: the model, on its device.
        objective: the objective that the model was trained with.
        info: where the model came from.
        decoder: converts the sampled images or latents to bytes.
        classes: labels to sample; they are assigned to the images in turn.
        scheduler: the scheduler: that of the settings, or the objective's default.
        clip: whether predicted images are clamped.
        device: device of the model.
        dtype: dtype of matrix products under autocast; None is float32. On a CPU without instructions for the dtype,
            tokdyn's own models compute in float32.
        out: folder to write to.
    """

    config: SampleConfig
    model: Any
    objective: Objective
    info: ModelInfo
    decoder: Decoder
    classes: tuple[int, ...]
    scheduler: SchedulerName
    clip: bool
    device: torch.device
    dtype: torch.dtype | None
    out: Path

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        return [self.classes[index % len(self.classes)] for index in range(self.config.count)]

    @property
    def names(self) -> list[str]:
        """The class name of each image."""
        return [class_name(label, self.info, self.model) for label in self.labels]

    @property
    def precision(self) -> str:
        """The precision that is used, "fp32" or "bf16"."""
        return "fp32" if self.dtype is None else "bf16"

    def described(self) -> dict[str, Any]:
        """Return the description of the model in sample.json."""
        return {
            "path": str(self.info.path),
            "name": self.info.name,
            "class": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "step": self.info.step,
        }

    def used(self) -> dict[str, Any]:
        """Return for sample.json what was chosen for the settings that may be None or "auto"."""
        return {
            "scheduler": self.scheduler,
            "clip": self.clip,
            "precision": self.precision,
            "device": str(self.device),
            "latents": self.decoder.latents,
        }


def prepare(config: SampleConfig) -> Job:
    """Load the model, its methods and its autoencoder, and check them against the settings. Writes nothing.

    Raises:
        TokdynError: a file is missing, or a setting is not possible with this model.
    """
    device = open_device(config.device)
    model, objective, info = load_model(config.model, config.ema)
    out = config.out or Path("samples", *(part for part in Path(info.name).parts if part not in ("..", "/")))
    require_folder(out)
    if config.maps and not takes_tail_drop(model):
        raise UnsupportedModelError(
            f"maps=true is not possible with {info.path}: it is a {type(model).__name__}, which computes every token. "
            "Set maps=false."
        )
    if not takes_tail_drop(model) and (any(config.tail_drop) or config.drop_curve or config.uncond_tail_drop):
        raise tail_drop_error(model)
    scheduler = config.scheduler or default_scheduler(objective)
    open_scheduler(scheduler, config.steps, objective)  # raises if the settings are not possible together
    decoder = open_decoder(model.config.in_channels, info.data, config.vae, device, info.latents)
    model.to(device)
    if config.methods is not None:
        if attachment_of(model) is not None:  # the folder replaces the methods that the model was trained with
            unwrap(model)
        load(model, config.methods)
    return Job(
        config=config,
        model=model,
        objective=objective,
        info=info,
        decoder=decoder,
        classes=class_numbers(config.classes, info, model),
        scheduler=scheduler,
        clip=not decoder.latents if config.clip is None else config.clip,
        device=device,
        dtype=product_type(config.precision, device),
        out=out,
    )
