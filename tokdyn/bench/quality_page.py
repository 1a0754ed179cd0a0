"""Write the result of `tokdyn bench quality`: an HTML page with a table and pictures, and the measurements as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tokdyn.bench.quality import QualityResult, QualityRow, points_of
from tokdyn.bench.settings import QualityConfig
from tokdyn.errors import DataError
from tokdyn.evaluate.images import open_images
from tokdyn.files import replacing
from tokdyn.report.gallery import Column, side_by_side
from tokdyn.report.grids import image_grid
from tokdyn.report.html import Html, code, table, tag
from tokdyn.report.page import Page, described
from tokdyn.report.pareto import ParetoPoint, draw_pareto, pareto_chart
from tokdyn.report.pixels import write_png

UNITS = "a multiply-add is 2 FLOPs"
_SHOWN = 8  # images of each stack on the page


def columns(rows: Sequence[QualityRow]) -> dict[str, list[str]]:
    """Return the columns of the table by title, each with one text per row. Empty columns are left out."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.values or ()))
    formats: dict[str, tuple[str, Any]] = {
        "stack": ("", lambda row: row.name),
        "kept": (".1%", lambda row: row.kept),
        "GFLOPs per image": (".1f", lambda row: row.tflops_per_image and 1e3 * row.tflops_per_image),
        "saved": (".1%", lambda row: row.flops_saved),
        "ms per image": (".1f", lambda row: row.milliseconds),
        "time saved": (".1%", lambda row: row.time_saved),
        "held-out loss": (".5f", lambda row: row.held_out),
        "PSNR, dB": (".1f", lambda row: row.psnr),
        "SSIM": (".3f", lambda row: row.ssim),
        "feature distance": (".3f", lambda row: row.feature_distance),
        **{name: (".2f", lambda row, name=name: (row.values or {}).get(name)) for name in metrics},
        "front": ("", lambda row: "yes" if row.front else ""),
    }
    table = {}
    for name, (format_spec, get) in formats.items():
        values = [get(row) for row in rows]
        if any(value not in (None, "") for value in values):
            table[name] = ["" if value is None else format(value, format_spec) for value in values]
    return table


def write_page(
    config: QualityConfig, result: QualityResult, further: Mapping[str, Html] | None = None
) -> tuple[Path, ...]:
    """Write quality.json, quality.html, samples.png and, if stacks can be ranked, pareto.png into `config.out`.

    Args:
        config: the settings.
        result: the measurements.
        further: more sections of the page, by title.

    Returns:
        The paths of the files.
    """
    out, rows = config.out, result.rows
    files = [out / "quality.json", out / "quality.html", out / "samples.png"]
    content = {
        "machine": result.machine,
        "units": UNITS,
        "settings": config.model_dump(mode="json"),
        "quality": result.quality,
        "rows": [_jsonable(asdict(row)) for row in rows],
    }
    with replacing(files[0]) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    shown = [_first_images(place) for place in result.places]
    count = min(len(images) for images in shown)
    grid = image_grid(np.concatenate([images[:count] for images in shown]), count, row_titles=[r.name for r in rows])
    write_png(grid, files[2])
    points = [] if result.quality is None else points_of(rows, result.quality)
    if len(points) > 1 and result.quality is not None:
        note = f"{config.count:,} images, {config.steps} steps, guidance {config.guidance:g}; {UNITS}"
        files.append(
            draw_pareto(points, out / "pareto.png", "GFLOPs per image", result.quality, note=note, joined=False)
        )
    page = _page(config, result, [images[:count] for images in shown], points)
    for title, section in (further or {}).items():
        page.add(title, section)
    page.write(files[1])
    return tuple(files)


def _first_images(place: Path) -> Any:
    """Read a few images, spread evenly over a folder and so over the classes, as (B, H, W, 3) uint8."""
    images = open_images(place)
    indices = {number * len(images) // _SHOWN for number in range(min(_SHOWN, len(images)))}
    return np.stack([image for image in images.images(sorted(indices), None) if not isinstance(image, DataError)])


def _page(config: QualityConfig, result: QualityResult, shown: Sequence[Any], points: Sequence[ParetoPoint]) -> Page:
    """Return the page.

    Args:
        config: the settings.
        result: the measurements.
        shown: for each stack the same few images (N, H, W, 3) uint8.
        points: the points to rank stacks by; empty if they cannot be ranked.
    """
    lead = (
        f"{config.count:,} images of each stack from the same seeds, {config.steps} steps, guidance "
        f"{config.guidance:g}. Savings, PSNR, SSIM and feature distance are relative to the first row."
    )
    page = Page("Quality of stacks", lead, described(result.machine))
    caption = "Stacks on the Pareto front are in bold." if any(row.front for row in result.rows) else ""
    page.add("Stacks", table(columns(result.rows), [row.front for row in result.rows], caption))
    if result.quality is not None and len(points) > 1:
        chart = pareto_chart(points, "GFLOPs per image", result.quality)
        page.add("Quality against cost", tag("div", chart, class_="charts") if chart else "")
    sides = [Column(row.name, _costs(row), list(images)) for row, images in zip(result.rows, shown, strict=True)]
    page.add("The same seeds with every stack", side_by_side(sides, [f"image {n + 1}" for n in range(len(shown[0]))]))
    page.add("Settings", code(json.dumps(config.model_dump(mode="json"), indent=1), "settings"))
    return page


def _costs(row: QualityRow) -> list[str]:
    """Return kept share, GFLOPs and ms of a stack, a line each, as far as they are known."""
    kept = [] if row.kept is None else [f"{row.kept:.1%} kept"]
    flops = [] if row.tflops_per_image is None else [f"{1e3 * row.tflops_per_image:.1f} GFLOPs"]
    return [*kept, *flops, *([] if row.milliseconds is None else [f"{row.milliseconds:.1f} ms"])]


def _jsonable(value: Any) -> Any:
    """Return the value with text in place of infinite numbers and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
