"""Decodes what a model generates, pixels or latents, into pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.data.config import DataConfig
from tokdyn.data.shards import LatentOrigin, read_index
from tokdyn.data.vae import LatentScaling, decode, load_vae, scaling_of, weights_digest
from tokdyn.errors import DataError, RecipeError
from tokdyn.report.pixels import Pixels, to_pixels

_AT_ONCE = 16  # latents per call of the autoencoder, whose activations are large


@dataclass(frozen=True)
class Decoder:
    """Turns samples into bytes.

    Attributes:
        vae: autoencoder that decodes the samples; None if they are pixels.
        scaling: scaling of the latents.
    """

    vae: nn.Module | None = None
    scaling: LatentScaling | None = None

    @property
    def latents(self) -> bool:
        """Whether the samples are latents."""
        return self.vae is not None

    def __call__(self, samples: Tensor) -> Pixels:
        """Decode samples (B, C, h, w) into (B, H, W, 3) uint8."""
        if self.vae is None or self.scaling is None:
            return to_pixels(samples)
        parts = [decode(self.vae, part, self.scaling).cpu() for part in torch.split(samples, _AT_ONCE)]
        return to_pixels(torch.cat(parts))


def open_decoder(
    channels: int,
    data: DataConfig | None,
    vae: str | None,
    device: torch.device,
    latents: LatentOrigin | None = None,
) -> Decoder:
    """Choose how samples become pictures.

    A model generates latents if it was trained on latents. If its data are not known, it does so if ``vae`` is given or
    if it has neither 1 nor 3 channels.

    Args:
        channels: channels of the samples.
        data: data that the model was trained on, if known.
        vae: path or hub id of an autoencoder; None takes the one that wrote the training data.
        device: where to decode.
        latents: origin of the training latents; None reads it from the folder of ``data``, if that still exists. Its
            scaling is undone even if another autoencoder is given.

    Raises:
        RecipeError: the model generates latents and no autoencoder is known, or the autoencoder does not fit.
        DataError: the autoencoder cannot be loaded.
    """
    if data is not None and data.kind != "latents":
        if vae is not None:
            raise RecipeError(f"vae={vae} has no effect: the model was trained on pixels ({data.kind}): leave it out.")
        return Decoder()
    if data is None and vae is None and channels in (1, 3):
        return Decoder()
    latents = latents or _origin(data)
    if vae is not None:
        autoencoder = load_vae(vae)
    elif latents is not None and latents.vae.source is not None:
        autoencoder = load_vae(latents.vae.source, latents.vae.subfolder)
        if weights_digest(autoencoder) != latents.vae.sha256:
            raise RecipeError(
                f"{latents.vae.source} is no longer the autoencoder that encoded the training data: give vae=PATH with "
                "the place where that one is now."
            )
    else:
        raise RecipeError(
            f"The model generates latents of {channels} channels and no autoencoder is known that decodes them: give "
            "vae=PATH or vae=HUB_ID, such as vae=stabilityai/sd-vae-ft-ema."
        )
    settings: Any = autoencoder.config
    if settings.get("latent_channels", channels) != channels:
        raise RecipeError(
            f"The model generates latents of {channels} channels, but the autoencoder decodes "
            f"{settings['latent_channels']}: give vae=PATH of the one that encoded the training data."
        )
    scaling = latents.scaling if latents is not None else scaling_of(autoencoder)
    return Decoder(autoencoder.to(device), scaling)


def _origin(data: DataConfig | None) -> LatentOrigin | None:
    """Return the origin of the latents that a model was trained on, or None if their folder is gone."""
    if data is None or data.path is None:
        return None
    try:
        return read_index(Path(data.path).expanduser()).origin
    except DataError:
        return None
