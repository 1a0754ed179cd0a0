"""Give all figures one style, with colours that colour-blind readers can tell apart, and save them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from tokdyn.files import replacing

# Okabe and Ito's palette, its yellow left out because it is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
INK, MUTED, GRID = "#222222", "#6b6b6b", "#e3e3e3"
DPI = 160
_BOX = "\u25a1"
_SPACING = 1.25  # height of a line over the size of its letters

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # text stays text
    "text.parse_math": False,  # a class may be called $5
}

_IN_COLUMN: Any = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
}


def font_file(bold: bool = False) -> Path:
    """Return the path of the font of all figures."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name


def with_drawable_letters(text: str) -> str:
    """Return the text with a box in place of every character that the font does not have."""
    return "".join(letter if ord(letter) in _glyphs() else _BOX for letter in text)


def in_lines(text: str, letters: int, inches: float, points: float) -> str:
    """Break a name into lines, between words where possible; what is beyond the last line becomes an ellipsis.

    Args:
        text: the name.
        letters: letters of a line.
        inches: height of all lines together; there is at least one, and at most three.
        points: size of the letters.
    """
    lines = min(3, max(1, int(72.0 * inches / (_SPACING * points))))
    return "\n".join(textwrap.wrap(with_drawable_letters(text), letters, max_lines=lines, placeholder="…"))


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    """Return the code points of the characters that the font has."""
    return frozenset(FT2Font(str(font_file())).get_charmap())


@contextmanager
def figure_style(column: bool = False) -> Iterator[None]:
    """Return a context in which figures have this style; matplotlib's settings are restored afterwards.

    Args:
        column: whether the figure is as wide as a column of a paper and shown in its own size, with smaller letters.
    """
    with matplotlib.rc_context({**_SETTINGS, **(_IN_COLUMN if column else {})}):
        yield


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, SVG or PDF, as the ending of `path` says, and return `path`.

    The file is written atomically and replaces an existing one. The folder is created if needed.
    """
    with replacing(path) as half:
        kind = path.suffix.removeprefix(".")
        figure.savefig(half, format=kind, dpi=DPI, bbox_inches="tight", pad_inches=0.12, facecolor="white")
    return path
