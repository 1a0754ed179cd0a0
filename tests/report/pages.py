"""A page with every kind of content, and names that try to become script."""

from __future__ import annotations

import numpy as np

from tokdyn.report.charts import Line, bars, chart
from tokdyn.report.explorer import NoiseFrame, explorer
from tokdyn.report.gallery import Column, gallery, side_by_side
from tokdyn.report.html import code, facts, table, tag
from tokdyn.report.page import Page
from tokdyn.report.pareto import ParetoPoint, pareto_chart

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "\"><img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "javascript:window.hacked=1",
    "& &amp; <b>\u2028</b>",
)
GRID, SIZE, IMAGES, LEVELS = (4, 4), 16, 3, 5


def frames() -> list[NoiseFrame]:
    """Noisy images and random masks at several levels."""
    random = np.random.default_rng(0)
    return [
        NoiseFrame(
            1.0 - place / LEVELS,
            random.integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8),
            random.random((IMAGES, *GRID)) > 0.2 * place,
        )
        for place in range(LEVELS)
    ]


def full_page(images: int = 12) -> Page:
    """Build the page."""
    random = np.random.default_rng(0)
    pixels = list(random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8))
    names = [HOSTILE[place % len(HOSTILE)] for place in range(images)]
    steps = list(range(0, 60000, 400))
    loss = [1.0 / (1 + step / 1000) for step in steps]
    points = [
        ParetoPoint(series=name, label=name, cost=cost, quality=1 / cost)
        for name in HOSTILE[:3]
        for cost in (0.001, 0.0015, 0.0031)
    ]
    page = Page(HOSTILE[0], HOSTILE[1], HOSTILE[2])
    page.add("Table", table({"run": names[:3], HOSTILE[1]: ["1", "2", "3"]}, [True, False, False], HOSTILE[3]))
    page.add("Keep maps", explorer(frames(), HOSTILE[:IMAGES], "frames"))
    page.add("Budgets", side_by_side([Column(name, [name], pixels[:3]) for name in HOSTILE], names[:3], names))
    lines = [Line(name, steps, loss) for name in HOSTILE]
    drawn = [chart(lines, "Loss", "training step", HOSTILE[4]), pareto_chart(points, "GFLOPs per image", "distance")]
    parts = {HOSTILE[0]: {"encoder": 1.0, HOSTILE[1]: 2.0}, "a run with a long name, longer than a bar is": {"x": 2.5}}
    page.add("Charts", tag("div", *drawn, bars(parts, "FLOPs of a step", "GFLOPs"), class_="charts"))
    page.add("Samples", gallery(pixels, names, names))
    page.add("Recipe", code(HOSTILE[0], "recipe"), facts({"path": HOSTILE[1]}))
    return page
