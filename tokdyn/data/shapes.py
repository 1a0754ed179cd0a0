"""Draw procedural images: a textured shape on a smooth background, with a ground-truth mask of the detail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.data.base import Dataset, to_signed
from tokdyn.data.hashing import Purpose, uniform
from tokdyn.data.outlines import OUTLINES
from tokdyn.errors import DataError

SMALLEST_SIDE = 16  # pixels; below it the classes cannot be told apart
_PIXELS_AT_ONCE = 1 << 17  # keeps the intermediate arrays in the cache
_BASE_DRAWS, _CHANNEL_DRAWS = 16, 6  # random numbers per image, and per channel of an image

Floats = NDArray[np.float32]


class ShapesDataset(Dataset):
    """Endless labelled images of ten shapes. Image i depends on (seed, i) alone, and its class is i mod num_classes.

    A shape has a fine texture and an outline of its own colour. The background varies slowly, over about the whole
    image. In every channel the shape is either brighter or darker than all of the background, so that the class can
    always be told from the shape, and from nothing else. Position, size, tilt, texture and colours are random.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: int = 3,
        num_classes: int | None = None,
        seed: int = 0,
        length: int = 50_000,
    ) -> None:
        """Check the settings.

        Args:
            size: (rows, columns) in pixels, each at least 16.
            channels: number of colour channels.
            num_classes: number of different shapes; None uses all ten.
            seed: seed of the content.
            length: samples in one epoch; larger indices are valid too.

        Raises:
            DataError: the size is too small, or there are not so many shapes.
        """
        count = len(OUTLINES) if num_classes is None else num_classes
        if not 1 <= count <= len(OUTLINES):
            raise DataError(
                f"num_classes={count}, but there are {len(OUTLINES)} shapes: choose 1 to {len(OUTLINES)} classes."
            )
        if min(size) < SMALLEST_SIDE:
            raise DataError(
                f"size={size[0]}x{size[1]} is too small for shapes: give at least {SMALLEST_SIDE} pixels a side."
            )
        self.shape = (channels, *size)
        self.class_names = tuple(OUTLINES)[:count]
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        """Number of images in an epoch; larger indices are valid too."""
        return self.length

    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Draw images; see `Dataset.fetch`."""
        wanted = self._checked(indices, None)
        labels = torch.from_numpy(wanted % self.num_classes)
        return to_signed(torch.from_numpy(self.pixels(wanted)), flips), labels, wanted.tolist()

    def identity(self) -> dict[str, object]:
        """See `Dataset.identity`."""
        return {
            "kind": "shapes", "version": 1, "shape": list(self.shape), "classes": self.num_classes,
            "seed": self.seed, "length": self.length,
        }  # fmt: skip

    def pixels(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return images (B, C, H, W) as bytes."""
        wanted = self._checked(indices, None)  # type: ignore[arg-type]
        images = np.empty((len(wanted), *self.shape), dtype=np.uint8)
        for part in self._parts(len(wanted)):
            images[part] = self._draw(wanted[part])
        return images

    def detail_masks(self, indices: Sequence[int]) -> Tensor:
        """Return masks (B, H, W) bool: True on the shape with its texture and outline, False on the background."""
        wanted = self._checked(indices, None)
        masks = np.empty((len(wanted), *self.shape[1:]), dtype=np.bool_)
        for part in self._parts(len(wanted)):
            draws = self._draws(wanted[part])
            masks[part] = self._distance(wanted[part] % self.num_classes, draws)[0] < 0.5
        return torch.from_numpy(masks)

    def detail_mask(self, index: int) -> Tensor:
        """Return the (H, W) bool mask of one image; see `detail_masks`."""
        return self.detail_masks([index])[0]

    def _parts(self, count: int) -> list[slice]:
        """Divide `count` images into slices that are drawn at once."""
        step = max(1, _PIXELS_AT_ONCE // (self.shape[1] * self.shape[2]))
        return [slice(start, start + step) for start in range(0, count, step)]

    def _draws(self, indices: NDArray[np.int64]) -> Floats:
        """Return the random numbers (B, K, 1, 1) in [0, 1) that the images are drawn from."""
        count = _BASE_DRAWS + _CHANNEL_DRAWS * self.shape[0]
        draws = uniform(self.seed, Purpose.SHAPE, indices[:, None], np.arange(count))
        return draws.astype(np.float32)[:, :, None, None]

    def _distance(self, labels: NDArray[np.int64], draws: Floats) -> tuple[Floats, Floats, Floats]:
        """Return three arrays (B, H, W) in pixels: the signed distance to the outline, and each pixel's coordinates.

        The coordinates are relative to the centre of the shape, along and across its tilted axis.
        """
        _, rows, columns = self.shape
        radius = (0.30 + 0.12 * draws[:, 0]) * np.float32(min(rows, columns))
        centre_x = radius + draws[:, 1] * (columns - 2 * radius)
        centre_y = radius + draws[:, 2] * (rows - 2 * radius)
        tilt = np.deg2rad(36 * draws[:, 3] - 18)
        x = np.arange(columns, dtype=np.float32) + np.float32(0.5) - centre_x
        y = (np.arange(rows, dtype=np.float32) + np.float32(0.5))[:, None] - centre_y
        along, across = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
        distance = np.empty_like(along)
        for label, outline in enumerate(OUTLINES.values()):
            members = np.flatnonzero(labels == label)
            if members.size:
                scale = radius[members]
                distance[members] = outline(along[members] / scale, across[members] / scale) * scale
        return distance, along, across

    def _draw(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Draw images (B, C, H, W) uint8."""
        channels, rows, columns = self.shape
        draws = self._draws(indices)
        distance, along, across = self._distance(indices % self.num_classes, draws)
        thickness = np.float32(np.sqrt(min(rows, columns) / 32))  # of lines, in pixels
        period = (3 + 2 * draws[:, 4]) * thickness
        coverage = np.clip(0.5 - distance, 0, 1)
        bright = np.maximum(_texture(along, across, period, draws[:, 5:9]), np.clip(distance + 0.5 + thickness, 0, 1))
        waves = [_wave(rows, columns, draws[:, first : first + 3]) for first in (9, 12)]
        images = np.empty((len(indices), *self.shape), dtype=np.float32)
        for channel in range(channels):
            first = _BASE_DRAWS + _CHANNEL_DRAWS * channel
            own = draws[:, first : first + _CHANNEL_DRAWS]
            level = (
                0.18 + 0.12 * own[:, 0] + (0.14 * own[:, 1] - 0.07) * waves[0] + (0.14 * own[:, 2] - 0.07) * waves[1]
            )
            dull, vivid = 0.50 + 0.14 * own[:, 3], 0.80 + 0.20 * own[:, 4]
            value = level + coverage * (dull + (vivid - dull) * bright - level)
            images[:, channel] = np.where(own[:, 5] < 0.5, value, 1 - value)
        return np.rint(images * 255).astype(np.uint8)


def _texture(along: Floats, across: Floats, period: Floats, draws: Floats) -> Floats:
    """Return textures (B, H, W) in [0, 1]: stripes, checks or dots.

    Args:
        along: (B, H, W) coordinates along the axis of the shape, in pixels.
        across: (B, H, W) coordinates across it.
        period: (B, 1, 1) periods in pixels.
        draws: (B, 4, 1, 1) random numbers in [0, 1): direction, two phases and kind.
    """
    angle = np.float32(np.pi) * draws[:, 0]
    pitch = np.float32(2 * np.pi) / period
    turn = np.float32(2 * np.pi) * draws[:, 1:3]
    u = np.sin(pitch * (np.cos(angle) * along + np.sin(angle) * across) + turn[:, 0])
    v = np.sin(pitch * (np.cos(angle) * across - np.sin(angle) * along) + turn[:, 1])
    kind = draws[:, 3]
    mixed: Floats = np.where(kind < 1 / 3, u, np.where(kind < 2 / 3, 1.5 * u * v, 0.8 * (u + v)))
    return np.asarray(np.clip(0.5 + 1.2 * mixed, 0, 1), dtype=np.float32)


def _wave(rows: int, columns: int, draws: Floats) -> Floats:
    """Return plane waves (B, H, W) in [-1, 1], with 0.2 to 0.9 periods per length of the shorter side.

    Args:
        rows: H.
        columns: W.
        draws: (B, 3, 1, 1) random numbers in [0, 1): direction, frequency and phase.
    """
    angle = np.float32(2 * np.pi) * draws[:, 0]
    pitch = np.float32(2 * np.pi) * (0.2 + 0.7 * draws[:, 1]) / min(rows, columns)
    x, y = np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32)[:, None]
    phase = pitch * (np.cos(angle) * x + np.sin(angle) * y) + np.float32(2 * np.pi) * draws[:, 2]
    return np.asarray(np.cos(phase), dtype=np.float32)
