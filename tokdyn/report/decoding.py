"""Convert what a model generates, pixels or latents, to images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.data.config import DataConfig
from tokdyn.data.shards import LatentOrigin, read_index
from tokdyn.data.vae import LatentScaling, decode, load_vae, scaling_of, weights_digest
from tokdyn.errors import DataError, RecipeError
from tokdyn.files import user_path
from tokdyn.report.pixels import Pixels, to_pixels

_AT_ONCE = 16  # latents per call of the autoencoder, whose activations are large


@dataclass(frozen=True)
class Decoder:
    """Converts samples to bytes.

    Attributes:
        vae: autoencoder that decodes the samples; None if they are pixels.
        scaling: scaling of the latents; None if the samples are pixels.
    """

    vae: nn.Module | None = None
    scaling: LatentScaling | None = None

    @property
    def latents(self) -> bool:
        """Whether the samples are latents."""
        return self.vae is not None

    def __call__(self, samples: Tensor) -> Pixels:
        """Convert samples (B, C, h, w) to images (B, H, W, 3) uint8."""
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
    """Return the decoder of a model's samples, loading the autoencoder if they are latents.

    A model generates latents if it was trained on latents. If its training data are not known, its samples are taken
    for latents if `vae` is given or if they have neither 1 nor 3 channels.

    Args:
        channels: channels of the samples.
        data: settings of the data that the model was trained on; None if not known.
        vae: path or hub id of an autoencoder; None takes the one that encoded the training data.
        device: device to decode on.
        latents: autoencoder and scaling of the training latents; None reads them from the folder of ``data``, if that
            still exists. The scaling is undone even if `vae` is given.

    Raises:
        RecipeError: `vae` is given for pixels, the model generates latents and no autoencoder is known, or the
            autoencoder has changed or has another number of channels.
        DataError: the autoencoder cannot be loaded.
    """
    if data is not None and data.kind != "latents":
        if vae is not None:
            raise RecipeError(f"vae={vae} has no effect, because the model was trained on {data.kind}: remove vae.")
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
                f"{latents.vae.source} is no longer the autoencoder that encoded the training data: give the path of "
                "that autoencoder with vae=PATH."
            )
    else:
        raise RecipeError(
            f"The model generates latents with {channels} channels and no autoencoder is known that decodes them: give "
            "vae=PATH or vae=HUB_ID, such as vae=stabilityai/sd-vae-ft-ema."
        )
    settings: Any = autoencoder.config
    if settings.get("latent_channels", channels) != channels:
        raise RecipeError(
            f"The model generates latents with {channels} channels, but the autoencoder decodes "
            f"{settings['latent_channels']}: give the path of the one that encoded the training data with vae=PATH."
        )
    scaling = latents.scaling if latents is not None else scaling_of(autoencoder)
    return Decoder(autoencoder.to(device), scaling)


def _origin(data: DataConfig | None) -> LatentOrigin | None:
    """Return the autoencoder and scaling of the training latents, or None if their folder does not exist any more."""
    if data is None or data.path is None:
        return None
    try:
        return read_index(user_path(data.path)).origin
    except DataError:
        return None
