"""Upcycle the transformer of a text-to-image pipeline on images that the pipeline draws itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from tokdyn import __version__
from tokdyn.attach import attached
from tokdyn.cost import flops, stats
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import json_object, replacing, require_folder
from tokdyn.host import describe, open_device, settle_memory
from tokdyn.pipelines import denoisers
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.prompts import title_of
from tokdyn.recorder import evaluating, recording
from tokdyn.report.charts import Line, chart
from tokdyn.report.gallery import Column, side_by_side
from tokdyn.report.grids import image_grid
from tokdyn.report.html import code, facts, tag
from tokdyn.report.page import Page, described
from tokdyn.report.pixels import Pixels, write_png
from tokdyn.seeds import Stream, seed_everything
from tokdyn.upcycling.conversion import check_method, upcycle
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.pipelines import distil, require_unused

REPORT, PICTURE, PAGE, BEGUN = "upcycle.json", "images.png", "upcycle.html", "settings.json"


@dataclass(frozen=True)
class PipelineResult:
    """The result of `upcycle_pipeline`.

    Attributes:
        folder: holds `methods`, metrics, a report, a page and a picture of images before and after. Errors in the
            report are means over the first and the last tenth of the steps.
        report: content of upcycle.json.
    """

    folder: Path
    report: dict[str, Any]


def upcycle_pipeline(
    config: PipelineConfig, methods: list[str], resume: bool = False, tell: Callable[[str], None] = lambda text: None
) -> PipelineResult:
    """Draw images, record the calls of the transformer, and distil it against itself with all tokens.

    Args:
        config: the settings.
        methods: "dc", "dydit" or both.
        resume: continue from the last checkpoint in the folder; the images are drawn again from the same seeds.
        tell: receives a summary before the first step: trained and frozen parameters, tokens and FLOPs of a call.

    Raises:
        TokdynError: the pipeline cannot be read or has several transformers, or its transformer does not support the
            methods.
    """
    settle_memory()
    for name in methods:
        check_method(name)
    device = open_device(config.device)
    out = config.out or Path("upcycled") / Path(config.base).name
    require_folder(out)
    facts = {
        **config.model_dump(mode="json", exclude={"steps", "checkpoint_every", "out", "device"}),
        "methods": methods,
    }
    if not resume:
        require_unused(out)  # before images are drawn in vain
    elif (out / BEGUN).is_file():
        changed = [name for name, value in json_object(out / BEGUN).items() if facts.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{out} was started with other settings; to resume it, set back {', '.join(changed)}."
            )
    pipe = open_pipeline(config.base, device, config.precision)
    if len(names := tuple(denoisers(pipe))) > 1:
        raise InputError(
            f"{config.base} draws with {' and '.join(names)}, of which upcycle would train one alone; train each in "
            f"Python, on calls that tokdyn.recording(pipe.{names[-1]}) keeps, with tokdyn.upcycling.distil."
        )
    drawn = call_arguments(pipe, config.drawing)
    with recording(pipe.transformer) as calls:
        before = _draw(pipe, drawn, config.seed)
    arguments = {"target": config.target} if "dc" in methods else {}
    seed_everything(config.seed, Stream.WEIGHTS)
    student = upcycle(pipe.transformer, methods, **arguments)
    teacher = pipe.transformer if config.trained == "all" else None
    pipe.transformer = None  # the original stays in memory only to teach
    summary = _summary(student, calls[0], config)
    tell("\n".join(f"{what:<12} {text}" for what, text in summary.items()))
    result = distil(student, calls, out, config.distillation, teacher=teacher, resume=resume, facts=facts)
    pipe.transformer = student.eval()
    after = _draw(pipe, drawn, config.seed)
    titles = ["all tokens", "upcycled"]
    both = rearrange(np.stack([before, after]), "side prompt h w c -> (prompt side) h w c")
    row_titles = [title_of(prompt) for prompt in config.prompts]
    write_png(image_grid(both, columns=2, row_titles=row_titles, column_titles=titles), out / PICTURE)
    trajectory, tenth = stats(student), max(1, len(result.rows) // 10)
    report = {
        "tokdyn": __version__,
        "settings": config.model_dump(mode="json"),
        "methods": methods,
        "model": type(student).__name__,
        "before_the_first_step": summary,
        "calls": len(calls),
        "error": {"first": _mean_error(result.rows[:tenth]), "last": _mean_error(result.rows[-tenth:])},
        "share_of_block_flops": trajectory.share,
        "machine": describe(device),
    }
    with replacing(out / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _page(report, result.rows, row_titles, list(before), list(after)).write(out / PAGE)
    return PipelineResult(out, report)


def _page(
    report: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    prompts: Sequence[str],
    before: Sequence[Pixels],
    after: Sequence[Pixels],
) -> Page:
    """Return the page: images before and after, the error over the steps, and the settings."""
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
    page.add("Settings", code(json.dumps(report["settings"], indent=1), "settings"))
    return page


def _summary(student: Any, call: Mapping[str, Any], config: PipelineConfig) -> dict[str, str]:
    """Summarise which parameters are trained and frozen, and what a recorded call costs before and after."""
    parts = attached(student).parts
    own = {id(parameter) for parameter in parts.parameters()}
    whole = sum(parameter.numel() for parameter in student.parameters() if id(parameter) not in own)
    new = sum(parameter.numel() for parameter in parts.parameters())
    with evaluating(student):
        cost = flops(student, **call)
    lines = {
        "kept as is": f"{whole:,} parameters of the {type(student).__name__}",
        "new": f"{new:,} parameters ({', '.join(type(each).__name__ for each in attached(student).methods)})",
        "frozen": "all but the new ones" if config.trained == "methods" else "none; a copy of the original teaches",
    }
    if cost.dense:
        lines["call"] = (
            f"{cost.dense / cost.batch / 1e9:,.3f} GFLOPs per image before, {cost.per_image / 1e9:,.3f} after "
            f"({cost.total / cost.dense:.2f}x; a multiply-add is 2)"
        )
    return lines


def _mean_error(rows: Sequence[dict[str, float]]) -> float:
    """Average the error of the output over some steps."""
    return sum(row["output"] for row in rows) / len(rows)


def _draw(pipe: Any, calls: Sequence[Mapping[str, Any]], seed: int) -> Any:
    """Draw one image per call, of a video the first frame: (P, H, W, 3) uint8."""
    return np.stack([draw(pipe, arguments, seed + number)[0] for number, arguments in enumerate(calls)])
