"""Write the result of `tokdyn bench quality`: an HTML page with a table and pictures, and the measurements as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tokdyn.bench.quality import QualityResult, QualityRow, points_of
from tokdyn.bench.settings import QualityConfig
from tokdyn.errors import DataError
from tokdyn.evaluate.images import open_images
from tokdyn.files import replacing
from tokdyn.report.grids import image_grid
from tokdyn.report.pareto import draw_pareto
from tokdyn.report.pixels import write_png

UNITS = "a multiply-add is 2 FLOPs"
_SHOWN = 8  # images of each stack on the page
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}tr.front td{font-weight:600}img{max-width:100%}"
)


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


def write_page(config: QualityConfig, result: QualityResult) -> tuple[Path, ...]:
    """Write quality.json, quality.html, samples.png and, if stacks can be ranked, pareto.png into `config.out`.

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
            draw_pareto(points, out / "pareto.png", "TFLOPs per image", result.quality, note=note, joined=False)
        )
    with replacing(files[1]) as temporary:
        temporary.write_text(_html(config, result, len(files) > 3), encoding="utf-8")
    return tuple(files)


def _first_images(place: Path) -> Any:
    """Read a few images, spread evenly over a folder and so over the classes, as (B, H, W, 3) uint8."""
    images = open_images(place)
    indices = {number * len(images) // _SHOWN for number in range(min(_SHOWN, len(images)))}
    return np.stack([image for image in images.images(sorted(indices), None) if not isinstance(image, DataError)])


def _html(config: QualityConfig, result: QualityResult, ranked: bool) -> str:
    """Return the page; `ranked` says whether there is a pareto.png."""
    table = columns(result.rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in table)
    body = "".join(
        f"<tr{' class=front' if row.front else ''}>"
        + "".join(f"<td>{escape(texts[number])}</td>" for texts in table.values())
        + "</tr>\n"
        for number, row in enumerate(result.rows)
    )
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    pictures = ["samples.png", *(["pareto.png"] if ranked else [])]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Quality of stacks</title>'
        f"<style>{_STYLE}</style>\n<h1>Quality of stacks</h1><p>{config.count:,} images of each "
        f"from the same seeds, {config.steps} steps, "
        f"guidance {config.guidance:g}. Savings, PSNR, SSIM and feature distance are relative to the first row; "
        f"{UNITS}.</p>\n"
        f"<table><tr>{head}</tr>\n{body}</table>\n"
        + "".join(f'<p><img src="{name}" alt="{name}"></p>\n' for name in pictures)
        + f"<p>{escape(machine)}</p></html>\n"
    )


def _jsonable(value: Any) -> Any:
    """Return the value with text in place of infinite numbers and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
