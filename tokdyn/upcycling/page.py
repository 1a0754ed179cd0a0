"""Build the page of an upcycled pipeline: images before and after, its budgets, and the error over the steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokdyn.report.charts import Line, chart
from tokdyn.report.gallery import Column, side_by_side
from tokdyn.report.html import code, facts, table, tag
from tokdyn.report.page import Page, described
from tokdyn.report.pixels import Pixels


def page_of(
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    prompts: Sequence[str],
    before: Sequence[Pixels],
    after: Sequence[Pixels],
) -> Page:
    """Return the page of a run.

    Args:
        report: content of upcycle.json.
        rows: metrics of every step.
        prompts: titles of the images.
        before: images with all tokens.
        after: images of the student.
    """
    base, share = report["settings"]["base"], report["share_of_block_flops"]
    lead = f"{', '.join(report['methods'])} on the {report['model']} of {base}"
    lead += "." if share is None else f": {share:.1%} of the FLOPs of its blocks."
    page = Page(f"Upcycling of {base}", lead, described(report["machine"]))
    page.add("Summary", facts({**report["before_the_first_step"], "recorded calls": f"{report['calls']:,}"}))
    sides = [Column("all tokens", (), before), Column("upcycled", (), after)]
    page.add("Images before and after", side_by_side(sides, prompts))
    error = Line("error", list(range(1, len(rows) + 1)), [row["output"] for row in rows])
    label = "mean square / variance of the teacher"
    page.add("Training", tag("div", chart([error], "Error of the output", "training step", label), class_="charts"))
    page.add("Budgets", table(budget_columns(report["budgets"]), caption=f"Error: {label}, on recorded calls."))
    page.add("Settings", code(json.dumps(report["settings"], indent=1), "settings"))
    return page


def budget_columns(budgets: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the columns of a table of budgets, by title."""
    return {
        "tail drop": ["-" if each["tail_drop"] is None else f"{each['tail_drop']:g}" for each in budgets],
        "GFLOPs per image": [f"{each['gflops_per_image']:,.3f}" for each in budgets],
        "error before": [f"{each['error_before']:.4f}" for each in budgets],
        "after": [f"{each['error']:.4f}" for each in budgets],
    }
