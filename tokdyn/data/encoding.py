"""Encode images into latents, shard by shard. A shard is one file of latents.

The noise of a posterior sample depends on the seed and the image alone, so that neither the batches nor an interruption
change the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokdyn.data.base import Dataset
from tokdyn.data.hashing import Purpose, generators
from tokdyn.data.loading import load_in_order
from tokdyn.data.shards import DTYPES
from tokdyn.data.vae import LatentScaling, encode
from tokdyn.errors import DataError


@dataclass(frozen=True)
class Encoder:
    """An autoencoder and its settings; calling it encodes images.

    Attributes:
        vae: a diffusers autoencoder for images.
        scaling: scaling that is applied to its latents.
        posterior: "mean" encodes to the mean of the posterior, "sample" to one sample of it.
        seed: seed of the samples.
        dtype: dtype of the stored latents: fp32, fp16 or bf16.
    """

    vae: nn.Module
    scaling: LatentScaling
    posterior: Literal["mean", "sample"]
    seed: int
    dtype: Literal["fp32", "fp16", "bf16"]

    def __call__(self, images: Tensor, indices: Sequence[int], mirrored: bool) -> Tensor:
        """Encode images into the latents to store.

        Args:
            images: (b, C, H, W) in [-1, 1].
            indices: the indices of the b images, which seed the posterior samples.
            mirrored: whether to mirror the images left to right first.

        Returns:
            (b, c, h, w) in the dtype `dtype`, on the CPU.

        Raises:
            DataError: the autoencoder cannot encode the images, or the latents overflow `dtype`.
        """
        noise = None
        if self.posterior == "sample":
            noise = generators(self.seed, Purpose.POSTERIOR, np.asarray(indices), int(mirrored))
        weight = next(self.vae.parameters())
        images = (images.flip(-1) if mirrored else images).to(weight.device, weight.dtype)
        latents = encode(self.vae, images, self.scaling, noise).to(DTYPES[self.dtype]).cpu()
        if not torch.isfinite(latents).all():
            raise DataError(f"The latents are too large for dtype={self.dtype}: set dtype=bf16 or dtype=fp32.")
        return latents


class Part(NamedTuple):
    """The content of a shard.

    Attributes:
        latents: (n, c, h, w).
        labels: (n,) int64.
        flipped: (n, c, h, w) latents of the mirrored images, or None.
    """

    latents: Tensor
    labels: Tensor
    flipped: Tensor | None


class _Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor, list[int]]]):
    """A data set whose items are batches: the images of one range of indices each."""

    def __init__(self, dataset: Dataset, ranges: Sequence[range]) -> None:
        self.dataset = dataset
        self.ranges = ranges

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor, list[int]]:
        return self.dataset.fetch(self.ranges[item])


def encode_parts(
    encoder: Encoder,
    dataset: Dataset,
    parts: Sequence[range],
    batch_size: int,
    flip: bool,
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Part]]:
    """Encode images part by part; each part is the content of one shard.

    Args:
        encoder: the autoencoder.
        dataset: the images.
        parts: for each part, the indices of its images.
        batch_size: images per call of the autoencoder.
        flip: encode the mirrored images as well.
        workers: number of processes that decode images; 0 decodes in this process.
        advance: called with the number of images finished since its last call.

    Yields:
        The index and the content of each part. Unreadable images are left out, and so is a part without a readable one.
    """
    starts = [(number, at) for number, part in enumerate(parts) for at in range(0, len(part), batch_size)]
    batches = _Batches(dataset, [parts[number][at : at + batch_size] for number, at in starts])
    loader = load_in_order(batches, range(len(starts)), workers)
    done: list[Part] = []
    for (number, at), (images, labels, used) in zip(starts, loader, strict=True):
        wanted = parts[number][at : at + batch_size]
        # The data set reads another image in place of an unreadable one; that image is encoded under its own index.
        kept = [place for place, (want, use) in enumerate(zip(wanted, used, strict=True)) if want == use]
        if kept:
            images, numbers = images[kept], [wanted[place] for place in kept]
            plain = encoder(images, numbers, mirrored=False)
            done.append(Part(plain, labels[kept], encoder(images, numbers, mirrored=True) if flip else None))
        advance(len(wanted))
        if at + batch_size >= len(parts[number]) and done:
            yield number, _joined(done)
            done = []


def _joined(parts: Sequence[Part]) -> Part:
    """Concatenate the batches of a part."""
    flipped = [part.flipped for part in parts if part.flipped is not None]
    latents, labels = torch.cat([part.latents for part in parts]), torch.cat([part.labels for part in parts])
    return Part(latents, labels, torch.cat(flipped) if flipped else None)
