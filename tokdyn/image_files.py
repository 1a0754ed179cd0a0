"""Open image files that may come from strangers: of known formats, and of no more pixels than a limit."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image

from tokdyn.limits import PIXELS
from tokdyn.reading import one_line

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")


def open_image(content: bytes) -> Image.Image:
    """Open an image file of one of the formats that are read, and look at its size, before any pixel is decoded.

    Other formats of Pillow are not tried, because some of them run other programs.

    Raises:
        ValueError: it has more pixels than the limit.
        Exception: of Pillow, if it is damaged or of another format.
    """
    if Image.MAX_IMAGE_PIXELS is not None and PIXELS.value > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = PIXELS.value  # a limit of Pillow's own
    try:
        image = Image.open(io.BytesIO(content), formats=_formats())
    except Image.DecompressionBombError as error:
        raise ValueError(f"{one_line(error).rstrip('.')}; {PIXELS.variable} sets the limit") from error
    if excess := PIXELS.excess(image.width * image.height):
        image.close()
        raise ValueError(f"it has {excess}")
    return image


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats of `_FORMATS` that this version of Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
