"""Draw grids of images with captions and titles. Images are copied pixel by pixel, not interpolated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokdyn.errors import InputError
from tokdyn.report.pixels import Pixels
from tokdyn.report.style import INK, MUTED, font_file, with_drawable_letters

_CELL = 96  # pixels; smaller images are enlarged by a whole factor to about this width
_GAP = 4  # pixels between images
_MARGIN = 12  # pixels around the grid


def image_grid(
    images: Pixels,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    column_titles: Sequence[str] | None = None,
    title: str | None = None,
    scale: int | None = None,
) -> Pixels:
    """Draw images in rows of equal length, on a white page.

    Args:
        images: (N, H, W, 3) uint8, row after row.
        columns: images per row; None makes the grid about square.
        captions: N texts to write below the images.
        row_titles: one text of one or several lines to the left of each row.
        column_titles: one text above each column.
        title: one line above the grid.
        scale: whole factor to enlarge by, without smoothing; None enlarges small images to about 96 pixels.

    Returns:
        The page, (height, width, 3) uint8.

    Raises:
        InputError: the images have another shape, or the number of texts is not that of images, rows or columns.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise InputError(f"images has shape {images.shape}, expected (N, H, W, 3) with at least one image.")
    count, height, width, _ = images.shape
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    for name, texts, expected in (
        ("captions", captions, count),
        ("row_titles", row_titles, rows),
        ("column_titles", column_titles, columns),
    ):
        if texts is not None and len(texts) != expected:
            raise InputError(f"{len(texts)} {name} were given for a grid of {expected}: give one text for each.")
    captions, column_titles = (
        texts and [with_drawable_letters(text) for text in texts] for texts in (captions, column_titles)
    )
    row_titles = row_titles and ["\n".join(map(with_drawable_letters, text.split("\n"))) for text in row_titles]
    title = title and with_drawable_letters(title)
    scale = scale or max(1, round(_CELL / width))
    cell_h, cell_w = height * scale, width * scale
    size = max(11, min(16, cell_w // 8), cell_w // 32)  # readable where a page shows large images smaller
    font, heading = _font(size), _font(size + 3, bold=True)
    below = size + 8 if captions else 0
    left = _MARGIN + (10 + max(_width(heading, text) for text in row_titles) if row_titles else 0)
    title_height = size + 16 if title else 0
    top = _MARGIN + title_height + (size + 12 if column_titles else 0)
    page = Image.new(
        "RGB",
        (
            max(left + columns * (cell_w + _GAP) - _GAP, left + _width(heading, title or "")) + _MARGIN,
            top + rows * (cell_h + below + _GAP) - _GAP + _MARGIN,
        ),
        "white",
    )
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((left, _MARGIN), title, INK, heading)
    for index, pixels in enumerate(images):
        x, y = left + index % columns * (cell_w + _GAP), top + index // columns * (cell_h + below + _GAP)
        page.paste(Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
        if captions:
            text = _shortened(font, captions[index], cell_w)
            draw.text((x + cell_w / 2, y + cell_h + 4), text, MUTED, font, anchor="ma")
    for row, text in enumerate(row_titles or ()):
        middle = top + row * (cell_h + below + _GAP) + cell_h / 2
        draw.multiline_text((left - 10, middle), text, INK, heading, anchor="rm", align="right")
    for column, text in enumerate(column_titles or ()):
        center = left + column * (cell_w + _GAP) + cell_w / 2
        draw.text((center, top - 8), _shortened(font, text, cell_w), INK, font, anchor="ms")
    return np.asarray(page)


def on_cells(images: Sequence[Pixels]) -> Pixels:
    """Put (H, W, 3) pictures at the bottom of equal white cells, above their captions: (N, height, width, 3)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    cells = np.full((len(images), height, width, 3), 255, np.uint8)
    for cell, image in zip(cells, images, strict=True):
        left = (width - image.shape[1]) // 2
        cell[height - image.shape[0] :, left : left + image.shape[1]] = image
    return cells


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font of figures in a size in pixels."""
    return ImageFont.truetype(font_file(bold), size)


def _width(font: ImageFont.FreeTypeFont, text: str) -> int:
    """Return the width of a text in pixels, that of its longest line."""
    return math.ceil(max(map(font.getlength, text.split("\n"))))


def _shortened(font: ImageFont.FreeTypeFont, text: str, width: int) -> str:
    """Return the text, shortened with an ellipsis if it is wider than so many pixels."""
    if font.getlength(text) <= width:
        return text
    kept = next((n for n in range(len(text), 0, -1) if font.getlength(text[:n] + "…") <= width), 0)
    return text[:kept] + "…"
