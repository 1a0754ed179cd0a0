"""Turn what a studio shows into HTML: the pictures, the token map, and the table of costs."""

from __future__ import annotations

import numpy as np
import torch

from tokdyn.bench.fidelity import psnr
from tokdyn.playground.scene import Drawn, Scene, Sketch
from tokdyn.playground.studio import Offer
from tokdyn.progress import in_ms
from tokdyn.report.explorer import legend
from tokdyn.report.html import Html, join, picture, table, tag
from tokdyn.report.maps import shade
from tokdyn.report.pixels import Pixels

PICTURE, TOKENS = "Picture", "Tokens"

LEGEND = join(
    (
        tag(
            "p",
            "Hatched are tokens that are dropped, merged into others, or reused from an earlier step.",
            class_="note",
        ),
        legend(),
    )
)
STYLE = """
.shown h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
.shown figure { margin: 0; }
.shown figure img { width: 100%; height: auto; border-radius: 3px; }
.shown img.cells { image-rendering: pixelated; }
.shown figcaption, .note { font-size: .9rem; opacity: .8; font-variant-numeric: tabular-nums; }
.shown .legend { list-style: none; padding: 0; margin: .3rem 0; font-size: .85rem; }
.shown .legend img { width: auto; height: 1.6rem; }
.shown table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.shown th, .shown td { padding: .25rem .8rem; text-align: right; }
.shown th:first-child, .shown td:first-child { text-align: left; }
"""


def nothing(title: str) -> Html:
    """Return the place of a picture that is not begun yet."""
    return join((tag("h2", title), tag("p", "Nothing is drawn yet.", class_="note")))


def pictures(scene: Scene, offer: Offer) -> tuple[Html, Html, Html]:
    """Return the picture, its token map, and the picture at full cost."""
    drawn, full = scene.drawn, scene.beside
    shown = _titled(PICTURE, drawn.picture, _progress(drawn))
    if drawn.keep is None:
        tokens = _titled(TOKENS, drawn.picture, "every token is computed")
    else:
        caption = f"{drawn.keep.mean():.1%} are computed by themselves"
        tokens = _titled(TOKENS, shade(drawn.picture, drawn.keep), caption)
    if full is None:
        return shown, tokens, nothing(offer.full)
    return shown, tokens, _titled(offer.full, full.picture, _progress(full))


def _titled(title: str, pixels: Pixels, caption: str) -> Html:
    return join((tag("h2", title), picture(pixels, f"{title}: {caption}", caption)))


def costs(scene: Scene, offer: Offer) -> Html:
    """Return the table of costs of the pictures that are finished; nothing before the first is."""
    drawn, full = scene.drawn, scene.beside
    if isinstance(drawn, Sketch):
        return Html("")
    rows = [("This picture", drawn)]
    if isinstance(full, Drawn) and full is not drawn:
        rows.append((offer.full, full))
    columns = {
        "": [name for name, _ in rows],
        "ms": [in_ms(each.seconds) for _, each in rows],
        "GFLOPs": ["-" if each.gflops is None else f"{each.gflops:,.2f}" for _, each in rows],
        "tokens kept": ["all" if each.kept is None else f"{each.kept:.1%}" for _, each in rows],
        "cached steps": [str(each.cached) for _, each in rows],
    }
    if all(each.kept is None for _, each in rows):
        columns.pop("tokens kept")
    if not any(each.cached for _, each in rows):
        columns.pop("cached steps")
    note = f"{offer.counted}, all {drawn.steps} steps and guidance branches; a multiply-add is 2 FLOPs."
    return join((table(columns, caption=note), _compared(drawn, full)))


def _compared(drawn: Drawn, full: Sketch | Drawn | None) -> Html:
    """Return a sentence that compares a picture with the one at full cost; nothing while there is none."""
    if not isinstance(full, Drawn) or full is drawn:
        return Html("")
    parts = [f"{full.seconds / drawn.seconds:.2f} times as fast"]
    if drawn.gflops is not None and full.gflops:
        parts.append(f"{drawn.gflops / full.gflops:.1%} of the FLOPs")
    if drawn.picture.shape == full.picture.shape:
        one, other = (torch.from_numpy(np.moveaxis(each.picture, -1, 0).copy())[None] for each in (drawn, full))
        distance = float(psnr(one, other))
        parts.append("the same picture" if np.isinf(distance) else f"PSNR {distance:.1f} dB")
    return tag("p", f"Beside the other: {', '.join(parts)}.")


def _progress(shown: Sketch | Drawn) -> str:
    """Say how far a picture is."""
    if isinstance(shown, Drawn):
        return f"{shown.steps} steps, {1e3 * shown.seconds:,.0f} ms"
    level = "" if shown.level is None else f", noise {shown.level:.2f}"
    return f"step {shown.step} of {shown.steps}{level}"
