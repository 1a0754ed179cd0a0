"""Write small SVG drawings on a light panel, so that they can be read on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

INK, MUTED, LINE, PAPER = "#22272e", "#5b6570", "#9aa4af", "#fbfbf9"
KEPT, DROPPED, SECOND, THIRD = "#0b7a75", "#dfe3e6", "#d55e00", "#0072b2"  # tell apart for colour-blind readers
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"


class Drawing:
    """A drawing of a width and height in pixels; what is added later lies above."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:g}' height='{height:g}' "
            f"viewBox='0 0 {width:g} {height:g}' role='img' {FONT}>",
            f"<title>{escape(title)}</title>",
            "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            "orient='auto'>"
            f"<path d='M0 0 L8 4 L0 8 z' fill='{MUTED}'/></marker></defs>",
            f"<rect width='{width:g}' height='{height:g}' rx='10' fill='{PAPER}'/>",
        ]

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = "none", line: str = LINE, radius: float = 4
    ) -> None:
        """Add a rectangle."""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='{radius:g}' fill='{fill}' "
            f"stroke='{line}'/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 13,
        colour: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Add a line of text, whose baseline is at y."""
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size:g}' fill='{colour}' text-anchor='{anchor}'{weight}>"
            f"{escape(text)}</text>"
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """Add an arrow."""
        self.line(x, y, to_x, to_y, MUTED, " marker-end='url(#head)'", 1.5)

    def line(
        self, x: float, y: float, to_x: float, to_y: float, colour: str = LINE, more: str = "", width: float = 1
    ) -> None:
        """Add a line."""
        self.parts.append(
            f"<line x1='{x:g}' y1='{y:g}' x2='{to_x:g}' y2='{to_y:g}' stroke='{colour}' "
            f"stroke-width='{width:g}'{more}/>"
        )

    def cells(self, x: float, y: float, side: float, colours: Sequence[Sequence[str]], kept: object = None) -> None:
        """Add a grid of cells of given colours; those that are not kept fade, those that are get an outline.

        Args:
            x: left edge.
            y: upper edge.
            side: side of a cell.
            colours: (R, C) fill colours.
            kept: (R, C) truth values; None keeps all, without outlines.
        """
        for row, line in enumerate(colours):
            for column, colour in enumerate(line):
                stays = kept is None or bool(kept[row][column])  # type: ignore[index]
                edge = f" stroke='{INK}' stroke-width='0.8'" if stays and kept is not None else ""
                faded = "" if stays else " opacity='0.16'"
                self.parts.append(
                    f"<rect x='{x + column * side:g}' y='{y + row * side:g}' width='{side:g}' height='{side:g}' "
                    f"fill='{colour}'{edge}{faded}/>"
                )

    def save(self, path: Path) -> Path:
        """Write the file and return its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*self.parts, "</svg>", ""]), encoding="utf-8")
        return path
