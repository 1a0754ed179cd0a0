"""Show images on pages: the same images under several settings beside each other, and all images of one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokdyn.report.html import Html, image, picture, tag
from tokdyn.report.pixels import Pixels


@dataclass(frozen=True)
class Column:
    """The images of one setting.

    Attributes:
        name: name of the setting.
        lines: what it costs, a line each.
        images: the images (H, W, 3) uint8, in the order of the rows; they may differ in size.
        captions: text below each image; empty for none.
    """

    name: str
    lines: Sequence[str]
    images: Sequence[Pixels]
    captions: Sequence[str] = ()


def side_by_side(columns: Sequence[Column], names: Sequence[str], notes: Sequence[str] = ()) -> Html:
    """Return a table with a column for each setting and a row for each image.

    Args:
        columns: the settings.
        names: names of the rows.
        notes: small text below each name, such as the seed; empty for none.
    """
    heads = [tag("th", column.name, *(tag("small", line) for line in column.lines), scope="col") for column in columns]
    rows = []
    for place, name in enumerate(names):
        note = tag("small", notes[place]) if place < len(notes) else ""
        cells = []
        for column in columns:
            caption = tag("small", column.captions[place]) if place < len(column.captions) else ""
            cells.append(tag("td", image(column.images[place], f"{name}, {column.name}"), caption))
        rows.append(tag("tr", tag("th", name, note, scope="row"), *cells))
    made = tag("table", tag("thead", tag("tr", tag("td"), *heads)), tag("tbody", *rows))
    large = any(pixels.shape[1] > 256 for column in columns for pixels in column.images)
    names_of = f"scroll side-by-side{' large' if large else ''}"
    return tag("div", made, class_=names_of, tabindex="0", role="region", aria_label="Images side by side")


def gallery(images: Sequence[Pixels], names: Sequence[str], notes: Sequence[str] = ()) -> Html:
    """Return images in rows as wide as the page, each with its name below and a note for readers who do not see it."""
    tiles = []
    for place, (pixels, name) in enumerate(zip(images, names, strict=True)):
        text = f"{name}, {notes[place]}" if place < len(notes) else name
        tiles.append(picture(pixels, text, name))
    return tag("div", *tiles, class_="tiles")
