"""Load diffusers' image autoencoders, encode images to latents scaled as model inputs, and decode them."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from tokdyn.errors import DataError
from tokdyn.files import user_path
from tokdyn.hub import reachable


class LatentScaling(BaseModel):
    """The affine map from an autoencoder's latents z to model inputs: `x = (z - mean) / std * factor`.

    Attributes:
        factor: the autoencoder's scaling factor.
        mean: shift; one element, or one per channel.
        std: divisor; one element, or one per channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    factor: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def apply(self, latents: Tensor) -> Tensor:
        """Return model inputs (B, C, h, w) from latents (B, C, h, w)."""
        mean, std = self._columns(latents)
        return (latents - mean) / std * self.factor

    def invert(self, inputs: Tensor) -> Tensor:
        """Return latents (B, C, h, w) from model inputs (B, C, h, w)."""
        mean, std = self._columns(inputs)
        return inputs / self.factor * std + mean

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std as tensors (C or 1, 1, 1), on the device and in the dtype of `like`."""
        return (like.new_tensor(self.mean)[:, None, None], like.new_tensor(self.std)[:, None, None])


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Return a context that silences warnings and logs of diffusers and the hub's client. Errors still raise."""
    from diffusers.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    before, hub_before = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        hub_logging.set_verbosity(hub_before)


def load_vae(path: str, subfolder: str | None = None) -> nn.Module:
    """Load any diffusers autoencoder for images.

    Args:
        path: folder of `save_pretrained`, folder of a pipeline, or hub id.
        subfolder: folder of the autoencoder below `path`; None looks in `path` itself, then in its folder "vae".

    Returns:
        The autoencoder in evaluation mode, in float32 on the CPU.

    Raises:
        DataError: nothing can be loaded from the path, or it is not an autoencoder for images.
    """
    import diffusers
    from huggingface_hub.errors import LocalEntryNotFoundError

    failure: Exception | None = None
    local = user_path(path)
    where, offline = (str(local), True) if local.is_dir() else (path, not reachable())
    for place in (subfolder,) if subfolder else (None, "vae"):
        try:
            with quiet_diffusers():
                config = diffusers.AutoencoderKL.load_config(where, subfolder=place, local_files_only=offline)
                kind = getattr(diffusers, str(config.get("_class_name")), None)
                if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "encode")):
                    raise DataError(
                        f"{path} holds a {config.get('_class_name')}, which does not encode images; give vae a "
                        "diffusers autoencoder such as AutoencoderKL or AutoencoderTiny."
                    )
                vae: nn.Module = kind.from_pretrained(where, subfolder=place, local_files_only=offline)  # type: ignore[attr-defined]
            return vae.eval()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            failure = failure or error
    # diffusers reports a hub that it cannot reach as a file that does not exist
    if isinstance(failure and failure.__context__, LocalEntryNotFoundError):
        raise DataError(
            f"The autoencoder {path} is neither a folder here nor in the cache of the hub, which cannot be reached: "
            "give vae a folder written by save_pretrained, or copy a filled cache from another machine."
        ) from failure
    raise DataError(
        f"No autoencoder can be loaded from {path} ({failure}): give vae a folder written by save_pretrained, the "
        "folder of a pipeline, or a hub id that can be reached from here."
    ) from failure


def scaling_of(vae: nn.Module) -> LatentScaling:
    """Read the scaling from the config of an autoencoder.

    The means and deviations per channel are read only for autoencoders with a posterior; others apply them in `encode`.
    """
    config: Any = vae.config
    factor = config.get("scaling_factor")
    shift = config.get("shift_factor")
    settings: dict[str, Any] = {"factor": 1.0 if factor is None else factor, "mean": (0.0 if shift is None else shift,)}
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None and hasattr(vae, "quant_conv"):
        settings |= {"mean": tuple(mean), "std": tuple(std)}
    return LatentScaling(**settings)


def encode(
    vae: nn.Module, images: Tensor, scaling: LatentScaling, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """Encode images to latents, scaled as model inputs.

    Args:
        vae: a diffusers autoencoder for images.
        images: (B, C, H, W) in [-1, 1], on the device and in the dtype of the autoencoder.
        scaling: scaling to apply to the latents.
        generators: B generators on the CPU to sample the posterior with, one per image; None takes the mean of the
            posterior.

    Returns:
        (B, c, h, w) float32.

    Raises:
        DataError: the autoencoder cannot encode the images, or does not give finite latents (B, c, h, w).
    """
    try:
        with torch.no_grad():
            output = vae.encode(images)  # type: ignore[operator]
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{len(images)} images do not fit into the memory of {images.device}: lower batch_size."
        ) from error
    except RuntimeError as error:
        raise DataError(
            f"{type(vae).__name__} cannot encode images of shape {tuple(images.shape[1:])} ({error}): choose a size "
            "and channels that it takes."
        ) from error
    posterior = getattr(output, "latent_dist", None)
    if posterior is not None and generators is not None:
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=generator) for generator in generators])
        latents = posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)
    elif posterior is not None:
        latents = posterior.mean.float()
    else:
        latents = (output.latents if hasattr(output, "latents") else output.latent).float()
    if latents.ndim != 4:
        raise DataError(
            f"{type(vae).__name__} gives latents of {latents.ndim} dimensions, expected 4: use an image autoencoder."
        )
    for axis in (2, 3):
        size, cells = images.shape[axis], latents.shape[axis]
        factor = 2 ** round(math.log2(size / cells))
        if cells * factor != size:
            raise DataError(
                f"{type(vae).__name__} turns {size} pixels into {cells} latents of {factor} pixels, which is "
                f"{cells * factor}: choose a size that {factor} divides."
            )
    latents = scaling.apply(latents)
    if not torch.isfinite(latents).all():
        raise DataError(
            f"{type(vae).__name__} gives latents that are not finite in {images.dtype}: set vae_dtype=fp32 or use an "
            "autoencoder that is made for this precision."
        )
    return latents


def decode(vae: nn.Module, inputs: Tensor, scaling: LatentScaling) -> Tensor:
    """Decode scaled latents (B, c, h, w) to images (B, C, H, W), float32 in [-1, 1], on the autoencoder's device."""
    weight = next(vae.parameters())
    with torch.no_grad():
        latents = scaling.invert(inputs.to(weight.device, torch.float32)).to(weight.dtype)
        images: Tensor = vae.decode(latents).sample  # type: ignore[operator]
    return images.float().clamp(-1, 1)


def weights_digest(model: nn.Module) -> str:
    """Return a SHA-256 over the names, shapes, dtypes and elements of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
