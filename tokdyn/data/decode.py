"""Decode image files of any mode and orientation to pixels of a given size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tokdyn.errors import DataError
from tokdyn.image_files import open_image
from tokdyn.reading import one_line

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ELONGATED = 64  # an image is cropped while it is resized if resizing all of it gave over 64 times the pixels needed
_ORIENTATION_TAG = 0x0112
_LARGEST_TAGS = (281, 341)  # MaxSampleValue and SMaxSampleValue of TIFF
_FULL_RANGE = ("PNG", "PPM")  # 16-bit integers end at 65535 in these, or Pillow scales them
_TWELVE_BITS = 4096  # values of an image with 12 bits, which cameras and microscopes store in 16
_UPRIGHT = {  # EXIF orientation -> the transposition that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Return a context that silences Pillow's warnings about odd tags and damaged EXIF blocks. Errors still raise.

    All threads of a process share its warning filters, so enter the context outside the threads that decode.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def decode(content: bytes, name: str, size: tuple[int, int] | None, channels: int) -> NDArray[np.uint8]:
    """Decode an image file, turn it upright, resize it and crop its centre.

    Transparent pixels are blended with white, unless there are 4 channels. 16-bit values are scaled to 8 bits, colour
    profiles are ignored, and of an animation the first frame is decoded.

    Args:
        content: the bytes of the file.
        name: name of the file, for error messages.
        size: (rows, columns) of the result; None leaves the image at its own size.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).

    Returns:
        (channels, rows, columns) uint8.

    Raises:
        DataError: the file is not an image, is damaged or truncated, or is too large to be decoded safely.
    """
    try:
        with open_image(content) as image:
            image.load()
            picture = _upright(_convert(image, _MODES[channels]), image)
        picture = picture if size is None else fit(picture, size)
        pixels = np.array(picture).reshape(picture.height, picture.width, channels)
    except Exception as error:  # Pillow's decoders raise anything on damaged files
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else one_line(error)
        reason = reason or type(error).__name__
        raise DataError(
            f"{name} is not a readable image ({reason}): repair or remove it, or skip such files with on_error=skip."
        ) from error
    return np.ascontiguousarray(rearrange(pixels, "rows columns channels -> channels rows columns"))


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an image to cover `size` and crop its centre, as ADM (arXiv 2105.05233) and DiT (2212.09748) do.

    The image is halved with a box filter as long as both sides stay at least as long as the target's. Then it is
    resized with a bicubic filter to the smallest size that covers the target, and cropped.

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
    """Resize an image to `size` and crop it at `box`, computing only the pixels inside the box.

    Args:
        image: the image.
        size: (width, height) to resize to.
        box: left, top, right and bottom of the crop, in pixels of the resized image.
    """
    across, down = image.width / size[0], image.height / size[1]
    source = (box[0] * across, box[1] * down, min(box[2] * across, image.width), min(box[3] * down, image.height))
    return image.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC, box=source)


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a mode with 8 bits per channel; blend transparent pixels with white unless it is "RGBA"."""
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_bytes(image)
    if mode != "RGBA" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert(mode)


def _to_bytes(image: Image.Image) -> Image.Image:
    """Scale a grey image of integers or floats to bytes, by the range that its file says.

    A TIFF may say its largest value. Otherwise that of integers is 65535, by definition in a PNG or a PPM; in other
    formats fewer bits may be in use, so that their values must show it. That of floats is 1.0, or 255 if one is
    above 1.

    Raises:
        ValueError: the range cannot be known, or there are values outside of it.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    largest = _stated_largest(image)
    if largest is None and image.mode == "F":
        largest = 1.0 if high <= 1.0 else 255.0
    elif largest is None:
        largest = 65535.0
        if image.format not in _FULL_RANGE and 0 < high < _TWELVE_BITS:
            raise ValueError(
                f"its integers end at {high:g}, and it does not say whether {largest:g} or less is white; save it "
                "with 8 bits"
            )
    margin = largest / 510.0  # half of a step between two bytes
    if low < -margin or high > largest + margin:
        raise ValueError(
            f"it holds values from {low:g} to {high:g}, where 0 to {largest:g} are expected; save it with 8 bits"
        )
    return Image.fromarray(np.clip(np.rint(values * (255.0 / largest)), 0, 255).astype(np.uint8))


def _stated_largest(image: Image.Image) -> float | None:
    """Return the value of white that a TIFF states; None for other files and those that state none."""
    tags = getattr(image, "tag_v2", {})
    stated = next((tags[tag] for tag in _LARGEST_TAGS if tag in tags), None)
    first = stated[0] if isinstance(stated, tuple) and stated else stated
    number = float(first) if isinstance(first, (int, float)) else 0.0
    return number if 0.0 < number < math.inf else None


def _upright(image: Image.Image, source: Image.Image) -> Image.Image:
    """Turn an image upright by the orientation in the EXIF block of `source`, the image as opened from its file."""
    try:
        orientation = source.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the EXIF block is damaged, the image is not
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
