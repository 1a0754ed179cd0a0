"""Write what `tokdyn calibrate` found as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokdyn.report.charts import Line, chart
from tokdyn.report.html import Html, code, facts, picture, table, tag
from tokdyn.report.page import Page, described


def write_page(report: Mapping[str, Any], figure: Path, path: Path, title: str) -> Path:
    """Write the page of a calibration.

    Args:
        report: content of calibration.json.
        figure: the picture that was drawn of it.
        path: path of the page.
        title: name of the model.

    Returns:
        `path`.
    """
    kind = report["method"]["method"]
    lead = f"{kind} for {title}: {report['flops']:.1%} of the FLOPs remain. Measured on {report['calls']:,} calls."
    page = Page(f"Calibration of {title}", lead, described(report["machine"]))
    page.add("What was found", _found(report))
    with Image.open(figure) as image:
        page.add("Figure", picture(np.asarray(image.convert("RGB")), page.title, whole=True))
    page.add("The method", code(json.dumps(report["method"], indent=1), "method"))
    page.add("Settings", code(json.dumps(report["settings"], indent=1), "settings"))
    return page.write(path)


def _found(report: Mapping[str, Any]) -> Html:
    """Return the skipped blocks at each noise level, or when a cache computes."""
    if "levels" in report:
        levels = report["levels"][::-1]
        columns = {
            "noise level": [f"{row['low']:.2f} to {row['high']:.2f}" for row in levels],
            "skipped blocks": [", ".join(map(str, row["skipped"])) or "none" for row in levels],
            "error of the output": [_digits(row["relative_error"]) for row in levels],
        }
        middles = [(row["low"] + row["high"]) / 2 for row in levels]
        line = Line("skipped blocks", middles, [len(row["skipped"]) for row in levels])
        drawn = chart([line], "Blocks skipped at each noise level", "noise level", "blocks", backwards=True)
        return Html(tag("div", drawn, class_="charts") + table(columns))
    fit = report["explained_variance"]
    known = {
        "threshold": f"{report['method']['threshold']:.4g}",
        "blocks run in": f"{report['computed_steps']:.1%} of the steps",
    }
    return facts(known if fit is None else {**known, "polynomial explains": f"{fit:.1%} of the variance"})


def _digits(value: float | None) -> str:
    """Return an error with four decimals; "" if it was not measured."""
    return "" if value is None else f"{value:.4f}"
