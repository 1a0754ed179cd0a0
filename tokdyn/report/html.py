"""Build HTML from texts, numbers and images. Every text is escaped here, once."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from tokdyn.report.pixels import Pixels

_LARGEST_PNG = (
    128 * 128
)  # pixels of a picture that is stored without loss; larger ones are photographs or decoded latents
_VOID = frozenset({"img", "input", "meta", "br"})


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


def html(value: object) -> Html:
    """Return a value as HTML: `Html` as it is, anything else as escaped text."""
    if isinstance(value, Html):
        return value
    return Html(escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Return the parts one after the other."""
    return Html(separator.join(html(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: name of the element.
        *children: its contents; what is not `Html` is escaped.
        **attributes: its attributes. An underscore at the end is removed (`class_`), others become hyphens
            (`data_level`). True is an attribute without value, None and False leave it out.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html(str(value))}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{join(children)}</{name}>")


def table(columns: Mapping[str, Sequence[object]], strong: Sequence[bool] = (), caption: str = "") -> Html:
    """Return a table from its columns, which scrolls sideways where it does not fit.

    Args:
        columns: the cells of each column, by title.
        strong: for each row, whether it is set in bold.
        caption: a line below the table.
    """
    head = tag("tr", *(tag("th", title, scope="col") for title in columns))
    body = []
    for number, row in enumerate(zip(*columns.values(), strict=True)):
        marked = number < len(strong) and strong[number]
        body.append(tag("tr", *(tag("td", cell) for cell in row), class_="strong" if marked else None))
    below = tag("p", caption, class_="note") if caption else ""
    made = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", tag("div", made, class_="scroll", tabindex="0", role="region", aria_label="table"), below)


def facts(pairs: Mapping[str, object]) -> Html:
    """Return names and their values, one line each."""
    return tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in pairs.items()), class_="facts")


def code(text: str, label: str = "") -> Html:
    """Return a block of code with a button that copies it."""
    button = tag("button", "Copy", type="button", class_="copy", aria_label=f"Copy {label}".strip())
    return tag("div", button, tag("pre", tag("code", text), tabindex="0"), class_="code")


def image_uri(pixels: Pixels) -> str:
    """Return an image (H, W, 3) uint8 as a data URI: PNG if it is small, else JPEG of high quality."""
    buffer = io.BytesIO()
    small = pixels.shape[0] * pixels.shape[1] <= _LARGEST_PNG
    if small:
        Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    else:
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=92, subsampling=0)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image(pixels: Pixels, text: str) -> Html:
    """Return an image (H, W, 3), which is shown enlarged if it is small.

    Args:
        pixels: (H, W, 3) uint8.
        text: what it shows, for readers who do not see it.
    """
    height, width = pixels.shape[:2]
    return tag(
        "img",
        src=image_uri(pixels),
        alt=text,
        width=width,
        height=height,
        loading="lazy",
        decoding="async",
        class_=None if width > 96 else "cells",
    )


def picture(pixels: Pixels, text: str, caption: object = "", whole: bool = False) -> Html:
    """Return an image with a caption below it.

    Args:
        pixels: (H, W, 3) uint8.
        text: what it shows, for readers who do not see it.
        caption: text below; "" for none.
        whole: whether the image is a figure of its own, as wide as the page allows, and not a tile.
    """
    shown = image(pixels, text)
    below = tag("figcaption", caption) if caption else ""
    return tag("figure", shown, below, class_="whole" if whole else "tile")


def data(content: Any, identifier: str) -> Html:
    """Return data for scripts as an element that holds JSON, in which no text can end the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Html(f'<script type="application/json" id="{html(identifier)}">{text}</script>')
