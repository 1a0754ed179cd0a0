"""Decodes image files to pixels of a given size, whatever their mode and orientation."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokdyn.errors import DataError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ELONGATED = 64  # an image is cropped before it is resized if resizing all of it gives more than 64 times the pixels
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> the transposition that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files, depending on the format and on where the damage is.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError,
    struct.error, zlib.error,
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Pillow's warnings about odd tags and damaged EXIF blocks; unreadable files still raise.

    The list of warning filters belongs to the process, so wrap this around the threads that decode, not inside them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def decode(content: bytes, name: str, size: tuple[int, int] | None, channels: int) -> NDArray[np.uint8]:
    """Decode an image file, turn it upright, resize it and crop its centre.

    Transparent pixels are put on white, unless four channels keep the alpha. Samples of 16 bits are scaled to 8, colour
    profiles are ignored, and of an animation the first frame is decoded.

    Args:
        content: the bytes of the file.
        name: name of the file in error messages.
        size: (rows, columns) of the result; None leaves the image at its own size.
        channels: 1 grey, 3 RGB, 4 RGBA.

    Returns:
        (channels, rows, columns) uint8.

    Raises:
        DataError: the file is not an image, is damaged or truncated, or is too large to be decoded safely.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            picture = _upright(_convert(image, _MODES[channels]), image)
        picture = picture if size is None else fit(picture, size)
        pixels = np.array(picture).reshape(picture.height, picture.width, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name}: the image has more pixels than are decoded safely ({error}). If it is meant to be that large, "
            "shrink it; otherwise remove it, or skip it with on_error=skip."
        ) from error
    except _DAMAGE as error:
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{name}: not a readable image ({reason}). Repair or remove it, or skip such files with on_error=skip."
        ) from error
    return np.ascontiguousarray(rearrange(pixels, "rows columns channels -> channels rows columns"))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image to cover `size` and crop the centre, as ADM (2105.05233) and DiT (2212.09748) prepare theirs.

    The image is halved with a box filter while both sides stay at least as long as the target's, then resized with a
    bicubic filter so that one side matches and the other one covers, then cropped. For a square target this is the rule
    of those papers.

    Args:
        image: an image with 8 bits per channel.
        size: (rows, columns) of the result.

    Returns:
        The image of `size`.
    """
    rows, columns = size
    while image.width >= 2 * columns and image.height >= 2 * rows:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(columns / image.width, rows / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - columns) // 2, (height - rows) // 2
    if width * height > _ELONGATED * rows * columns:
        return _centre_resized(image, (width, height), (left, top, left + columns, top + rows))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + columns, top + rows))


def _centre_resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Resize `image` to `size` and crop it at `box`, computing the pixels inside the box only."""
    across, down = image.width / size[0], image.height / size[1]
    source = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
    return image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC, box=source)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `mode`, with 8 bits per channel and transparent pixels on white."""
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_bytes(image)
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)


def _to_bytes(image: Image.Image) -> Image.Image:
    """Scale grey images of 16-bit integers (0 to 65535) or of floats (0 to 1, else 0 to 255) to bytes."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    largest = 65535.0 if image.mode != "F" else 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    return Image.fromarray(np.clip(np.rint(values * (255.0 / largest)), 0, 255).astype(np.uint8))


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """Turn the image as the orientation in the file's EXIF block says, if there is one."""
    try:
        orientation = source.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:  # the EXIF block is damaged, the image is not
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
