"""Build the page of `tokdyn report` from what was sampled of each run and what lies in its folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokdyn.files import require_folder
from tokdyn.host import describe, open_device, settle_memory
from tokdyn.progress import progress
from tokdyn.report.charts import Line, bars, chart
from tokdyn.report.explorer import explorer
from tokdyn.report.gallery import Column, gallery, side_by_side
from tokdyn.report.html import Html, code, facts, join, table, tag
from tokdyn.report.page import Page, described
from tokdyn.report.pareto import ParetoPoint, pareto_chart
from tokdyn.run_report.folders import RESULTS, Folder, curve, quality_points, read_folder, shown
from tokdyn.run_report.parts import NOTE
from tokdyn.run_report.sampled import Budget, Sampled, Setting, budgets_of, open_run, sample_run
from tokdyn.run_report.settings import Drawing, ReportConfig

_COMPARED = 8  # images beside each other at all budgets
CURVES = {"loss": "training loss", "kept": "tokens kept, share", "ratio": "ratio loss", "grad_norm": "gradient norm"}
"""Metrics that are drawn, and the labels of their axes; others are left out."""


@dataclass(frozen=True)
class Run:
    """One subject of a report.

    Attributes:
        name: name on the page, unique in it.
        folder: its files.
        sampled: what was sampled of it; None for a folder of measurements.
    """

    name: str
    folder: Folder
    sampled: Sampled | None


def gather(
    config: Drawing, paths: Sequence[str], settings: Mapping[str, Sequence[Setting]] | None = None
) -> tuple[Run, ...]:
    """Read the folders and sample the runs among them. All are opened before the first is sampled.

    Args:
        config: the settings.
        paths: as for `report`.
        settings: how to sample a run, by its path; others are sampled with each tail drop of `config`.

    Returns:
        A run for each path.

    Raises:
        TokdynError: a folder cannot be read, or a model cannot be loaded or sampled with these settings.
    """
    settle_memory()
    folders = [read_folder(path) for path in paths]
    jobs = [open_run(config, folder.model) if folder.holds_model else None for folder in folders]
    chosen = [
        () if job is None else (settings or {}).get(path) or budgets_of(config, job)
        for path, job in zip(paths, jobs, strict=True)
    ]
    steps = config.steps * -(-config.count // config.batch_size)
    with progress("sampling", steps * sum(map(len, chosen))) as advance:
        sampled = [
            None if job is None else sample_run(config, job, ways, advance)
            for job, ways in zip(jobs, chosen, strict=True)
        ]
    names = [folder.name if job is None else job.info.name for folder, job in zip(folders, jobs, strict=True)]
    unique = [
        name if names.count(name) == 1 else f"{name} ({folder.path})"
        for name, folder in zip(names, folders, strict=True)
    ]
    unique = [name if unique.count(name) == 1 else f"{name} #{n + 1}" for n, name in enumerate(unique)]
    return tuple(Run(*each) for each in zip(unique, folders, sampled, strict=True))


def report(config: ReportConfig, paths: Sequence[str]) -> Path:
    """Sample the runs, and write the page.

    Args:
        config: the settings.
        paths: one or several runs, models, names of pretrained models, or folders that `tokdyn bench quality`, `tune`,
            `calibrate` and `upcycle` have written.

    Returns:
        The path of the page.

    Raises:
        TokdynError: as in `gather`, or the page cannot be written.
    """
    require_folder(config.out.parent)
    runs = gather(config, paths)
    return build(config, runs, paths).write(config.out)


def build(config: ReportConfig, runs: Sequence[Run], paths: Sequence[str]) -> Page:
    """Return the page of some runs.

    Args:
        config: the settings.
        runs: the runs, from `gather`.
        paths: the paths as the user gave them, for the command that repeats the report.
    """
    drawn = {run.name: run.sampled for run in runs if run.sampled is not None}
    names = ", ".join(run.name for run in runs)
    lead = "What lies in these folders."
    if drawn:
        lead = f"{config.count} images of each run and budget from the same seeds, {config.steps} steps"
        lead += f", guidance {config.guidance:g}." if config.guidance != 1.0 else ", without guidance."
    page = Page(f"Report: {names}", lead, described(describe(open_device(config.device))))
    page.add("Summary", _summary(runs))
    page.add(
        "What chunking sees",
        *(
            join((_heading(name, drawn), explorer(each.frames, each.names[: config.map_images], f"frames-{number}")))
            for number, (name, each) in enumerate(drawn.items())
            if each.frames
        ),
    )
    page.add("Budgets", _budgets(drawn))
    page.add("Quality against cost", _pareto(runs, drawn))
    page.add("Where FLOPs and time go", _parts(drawn))
    page.add("Samples", *(join((_heading(name, drawn), _samples(each))) for name, each in drawn.items()))
    page.add("Training", _training(runs))
    page.add("Measurements", *(_results(run) for run in runs))
    page.add("Recipe and how to reproduce it", *(_recipe(config, run, paths) for run in runs))
    return page


def _heading(name: str, runs: Mapping[str, Sampled]) -> Html:
    """Return the name of a run as a heading, if there are several runs."""
    return tag("h3", name) if len(runs) > 1 else Html("")


def _text(value: float | None, form: str) -> str:
    """Return a number in a format; "" for None."""
    return "" if value is None else format(value, form)


def _summary(runs: Sequence[Run]) -> Html:
    """Return a table with one row for each run and budget."""
    rows = [(run, budget) for run in runs if run.sampled is not None for budget in run.sampled.budgets]
    if not rows:
        return facts({run.name: f"measurements in {run.folder.path}" for run in runs})
    columns = {
        "run": [run.name for run, _ in rows],
        "model": [type(sampled(run).job.model).__name__ for run, _ in rows],
        "parameters, M": [f"{sampled(run).parameters / 1e6:.2f}" for run, _ in rows],
        "methods": [_methods(run, budget) for run, budget in rows],
        "tail drop": [f"{budget.tail_drop:g}" for _, budget in rows],
        "unconditional": [_text(budget.setting.uncond_tail_drop, "g") for _, budget in rows],
        "kept": ["100.0%" if budget.kept is None else f"{budget.kept:.1%}" for _, budget in rows],
        "GFLOPs": [_text(budget.gflops, ".3f") for _, budget in rows],
        "ms": [f"{budget.milliseconds:.1f}" for _, budget in rows],
        "PSNR, dB": ["" if budget.psnr is None else f"{budget.psnr:.1f}" for _, budget in rows],
    }
    for title, nothing in (("methods", "none"), ("unconditional", "")):
        if all(text == nothing for text in columns[title]):
            del columns[title]
    return table(columns, caption="GFLOPs and ms per image. PSNR is the similarity to the run's own largest budget.")


def _methods(run: Run, budget: Budget) -> str:
    """Return the names of the methods that acted when a budget was sampled."""
    return budget.name if budget.setting.methods else sampled(run).methods


def sampled(run: Run) -> Sampled:
    """Return what was sampled of a run of which something was."""
    assert run.sampled is not None
    return run.sampled


def cost_lines(budget: Budget) -> list[str]:
    """Return kept share, GFLOPs and ms of a budget, a line each."""
    kept = "all tokens" if budget.kept is None else f"{budget.kept:.1%} kept"
    flops = [] if budget.gflops is None else [f"{budget.gflops:.3f} GFLOPs"]
    return [kept, *flops, f"{budget.milliseconds:.1f} ms"]


def _budgets(drawn: Mapping[str, Sampled]) -> Html:
    """Return the first images of all budgets beside each other; runs that draw the same classes are in one table."""
    groups: dict[tuple[str, ...], list[tuple[str, Sampled]]] = {}
    for name, each in drawn.items():
        groups.setdefault(each.names[:_COMPARED], []).append((name, each))
    tables = []
    for names, members in groups.items():
        columns = [
            Column(
                budget.name if len(drawn) == 1 else f"{name}, {budget.name}",
                cost_lines(budget),
                list(budget.images[:_COMPARED]),
            )
            for name, each in members
            for budget in each.budgets
        ]
        first = members[0][1].job.config.seed
        tables.append(side_by_side(columns, names, [f"seed {first + place}" for place in range(len(names))]))
    return join(tables)


def _samples(run: Sampled) -> Html:
    """Return all images of the largest budget."""
    seeds = [f"seed {run.job.config.seed + place}" for place in range(len(run.names))]
    return gallery(list(run.budgets[0].images), run.names, seeds)


def _pareto(runs: Sequence[Run], drawn: Mapping[str, Sampled]) -> Html:
    """Return plots of quality against GFLOPs and ms: of the sampled budgets, and of measurements in the folders."""
    charts = []
    for cost, unit in (("gflops", "GFLOPs per image"), ("milliseconds", "ms per image")):
        lines = []
        for name, each in drawn.items():
            series: dict[tuple[float | None, bool], list[tuple[float, float, str]]] = {}
            for budget in each.budgets[1:]:
                value, setting = getattr(budget, cost), budget.setting
                if value is not None and budget.psnr is not None:
                    note = budget.name if budget.kept is None else f"{budget.name}, {budget.kept:.1%} kept"
                    kind = setting.uncond_tail_drop, bool(setting.methods)
                    series.setdefault(kind, []).append((value, budget.psnr, note))
            for (lite, stacks), points in series.items():
                x, y, notes = zip(*points, strict=True)
                label = name if lite is None else f"{name}, Lite-CFG {lite:g}"
                lines.append(Line(label, x, y, notes, joined=not stacks))
        charts.append(chart(lines, f"Similarity to the largest budget against {unit.split()[0]}", unit, "PSNR, dB"))
    by_measurement: dict[str, list[ParetoPoint]] = {}
    for run in runs:
        name, found = quality_points(run.folder)
        by_measurement.setdefault(name, []).extend(found)
    charts += [pareto_chart(points, "GFLOPs per image", name) for name, points in by_measurement.items() if points]
    content = join(charts)
    return tag("div", content, class_="charts") if content else content


def _parts(drawn: Mapping[str, Sampled]) -> Html:
    """Return FLOPs and time by part of each run, as bars and as a table."""
    if not drawn:
        return Html("")
    flops = {name: {part.name: part.gflops for part in run.parts if part.gflops} for name, run in drawn.items()}
    times = {name: {part.name: part.milliseconds for part in run.parts} for name, run in drawn.items()}
    rows = [(name, part) for name, run in drawn.items() for part in run.parts]
    columns = {
        "run": [name for name, _ in rows],
        "part": [part.name for _, part in rows],
        "GFLOPs": [f"{part.gflops:.4f}" for _, part in rows],
        "share of GFLOPs": [f"{part.gflops / (sum(flops[name].values()) or 1.0):.1%}" for name, part in rows],
        "ms": [f"{part.milliseconds:.3f}" for _, part in rows],
        "share of ms": [f"{part.milliseconds / (sum(times[name].values()) or 1.0):.1%}" for name, part in rows],
    }
    if len(drawn) == 1:
        del columns["run"]
    charts = (bars(flops, "FLOPs of a step", "GFLOPs"), bars(times, "Time of a step", "ms"))
    return join((tag("div", *charts, class_="charts"), table(columns, caption=NOTE)))


def _training(runs: Sequence[Run]) -> Html:
    """Return training curves; several runs are in one chart."""
    charts = []
    for metric, label in CURVES.items():
        lines = [Line(run.name, *curve(run.folder.metrics, metric)) for run in runs]
        charts.append(chart([line for line in lines if line.x], label.capitalize(), "training step", label))
    content = join(charts)
    return tag("div", content, class_="charts") if content else content


def _results(run: Run) -> Html:
    """Return the measurements in a folder."""
    parts = []
    for name, content in run.folder.results.items():
        parts.append(tag("h3", f"{run.name}: {name} of {RESULTS[name]}"))
        parts.append(code(shown(content), name))
    return join(parts)


def _recipe(config: ReportConfig, run: Run, paths: Sequence[str]) -> Html:
    """Return the recipe of a run and the commands that train, sample and report it again."""
    path, commands = run.folder.model, []
    if run.folder.recipe:
        commands.append(["tokdyn", "train", f"{run.folder.path}/recipe.yaml", f"out={path}-again"])
    if run.sampled is not None:
        commands.append(
            [
                "tokdyn",
                "sample",
                path,
                f"scheduler={run.sampled.job.scheduler}",
                *_changed(config, "steps", "guidance", "seed"),
            ]
        )
    commands.append(["tokdyn", "report", *paths, *_changed(config)])
    parts = [tag("h3", run.name), code("\n".join(shlex.join(words) for words in commands), "commands")]
    if run.folder.recipe:
        parts.append(code(run.folder.recipe, "recipe"))
    return join(parts)


def _changed(config: ReportConfig, *always: str) -> list[str]:
    """Return the settings that differ from their defaults as `key=value`, and those that are always given."""
    words = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if value is not None and (
            value != info.get_default(call_default_factory=True) if not always else name in always
        ):
            text = ",".join(f"{each:g}" for each in value) if isinstance(value, tuple) else str(value)
            words.append(f"{name}={text.lower() if isinstance(value, bool) else text}")
    return words
