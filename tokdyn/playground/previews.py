"""Show the latents of a pipeline while it draws: the clean picture that they lead to, decoded where that is known."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tokdyn.data.vae import scaling_of
from tokdyn.report.pixels import Pixels, to_pixels

Scales = tuple[float, float]
"""Factors of the clean latents and of the noise in noisy ones."""
_SMALL = 1e-4
_UNPACKING = ("latents", "height", "width", "vae_scale_factor")


class Preview:
    """Shows the latents of one call of a pipeline.

    Args:
        pipe: the pipeline.
        height: of the picture in pixels; None is the default of the pipeline.
        width: likewise.
    """

    def __init__(self, pipe: Any, height: int | None = None, width: int | None = None) -> None:
        self._pipe, self._size = pipe, (height, width)
        self._before: Tensor | None = None
        self._decodes = True

    def note(self, latents: Tensor) -> None:
        """Note the latents of a step that is not shown."""
        self._before = latents.detach().clone()

    def picture(self, index: int, latents: Tensor) -> Pixels:
        """Return what the latents after a step lead to, (H, W, 3); of a video the first frame.

        The clean latents are taken from those before and after the step, if the sampler is known: a step of an ODE
        sampler of first order moves along the line through both. Latents that cannot be decoded are shown themselves.

        Args:
            index: of the step, from 0.
            latents: (B, ...) after it.
        """
        clean = latents.detach()[:1]
        earlier, now = (scales_of(self._pipe.scheduler, at) for at in (index, index + 1))
        before = self._before
        if before is not None and before.shape == latents.shape and earlier is not None and now is not None:
            clean = clean_of(before[:1], earlier, clean, now)
        self.note(latents)
        if self._decodes:
            try:
                decoded: Pixels = to_pixels(self._decoded(clean))[0]
                return decoded
            except Exception:  # the latents of another pipeline may have any form
                self._decodes = False
        return _as_colours(clean)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Decode latents to (1, 3, H, W) in [-1, 1]."""
        pipe = self._pipe
        if latents.dim() == 3:
            latents = self._unpacked(latents)
        video = latents.dim() == 5
        flat = latents[:, :, 0] if video else latents
        weight = next(pipe.vae.parameters())
        inputs = scaling_of(pipe.vae).invert(flat.to(weight.device, torch.float32)).to(weight.dtype)
        with torch.no_grad():
            images: Tensor = pipe.vae.decode(inputs[:, :, None] if video else inputs, return_dict=False)[0]
        return images[:, :, 0] if images.dim() == 5 else images

    def _unpacked(self, latents: Tensor) -> Tensor:
        """Put the patches (1, N, D) of latents side by side, as the pipeline does at its end."""
        pipe = self._pipe
        unpack = pipe._unpack_latents
        if tuple(inspect.signature(unpack).parameters) != _UNPACKING:
            raise NotImplementedError
        height, width = (each or pipe.default_sample_size * pipe.vae_scale_factor for each in self._size)
        unpacked: Tensor = unpack(latents, height, width, pipe.vae_scale_factor)
        return unpacked


def scales_of(scheduler: Any, index: int) -> Scales | None:
    """Return the scales of the latents before step `index`, counted from 0; None if they are not known."""
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if "FlowMatch" in type(scheduler).__name__ and sigmas is not None and index < len(sigmas):
        sigma = float(sigmas[index])
        return 1.0 - sigma, sigma
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None or index > len(timesteps):
        return None
    signal = 1.0 if index == len(timesteps) else float(products[int(timesteps[index])])
    return signal**0.5, (1.0 - signal) ** 0.5


def clean_of(before: Tensor, earlier: Scales, after: Tensor, now: Scales) -> Tensor:
    """Return the clean latents that two noisy ones have in common, which consist of them and of the same noise.

    Args:
        before: latents at the scales `earlier`.
        earlier: scales of the clean latents and of the noise.
        after: latents at the scales `now`, of the same shape.
        now: likewise.
    """
    weight = earlier[1] * now[0] - now[1] * earlier[0]
    if abs(weight) < _SMALL:
        return after
    return (earlier[1] * after.float() - now[1] * before.float()) / weight


def _as_colours(latents: Tensor) -> Pixels:
    """Show three channels of latents, or of any tensor, as (H, W, 3) with all their contrast."""
    found = latents.float()
    if found.dim() == 3:  # (1, N, D): a square of patches, as far as they make one
        side = int(found.shape[1] ** 0.5)
        found = found[:, : side * side].transpose(1, 2).reshape(len(found), -1, side, side)
    found = found[:, :, 0] if found.dim() == 5 else found
    found = found[:, :3] if found.shape[1] >= 3 else found[:, :1].expand(-1, 3, -1, -1)
    low, high = found.amin((2, 3), keepdim=True), found.amax((2, 3), keepdim=True)
    shown: Pixels = to_pixels(2.0 * (found - low) / (high - low).clamp_min(_SMALL) - 1.0)[0]
    return shown
