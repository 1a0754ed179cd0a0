"""Compare stacks on a pipeline of diffusers: pictures of the same prompts and noise, times and FLOPs.

A stack is a list of methods that act together on a model.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokdyn.bench.compare import Compared, compare
from tokdyn.bench.settings import PipelineBenchConfig
from tokdyn.bench.stacks import Stack
from tokdyn.errors import RecipeError
from tokdyn.files import replacing, require_folder
from tokdyn.host import describe, open_device, settle_memory
from tokdyn.pipelines import load, set_tail_drop, unwrap, wrap
from tokdyn.pipelines.drawing import call_arguments
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.progress import in_ms
from tokdyn.prompts import title_of
from tokdyn.report.gallery import Column, side_by_side
from tokdyn.report.html import Html, table
from tokdyn.report.page import Page, described
from tokdyn.report.pixels import write_png

UNITS = "a multiply-add is 2 FLOPs, of blocks and methods"
_SHOWN = ("steps", "guidance", "height", "width", "frames", "seed", "precision")  # settings, on the page


@dataclass(frozen=True)
class PipelineBench:
    """Stacks beside the pipeline without methods.

    Attributes:
        compared: one comparison for each stack, by its name.
        machine: what it ran on.
    """

    compared: dict[str, Compared]
    machine: dict[str, str | int]

    def columns(self) -> dict[str, list[str]]:
        """Return the columns of the table by title, each with one text per stack."""
        rows = list(self.compared.values())
        seconds = [[statistics.median(pair.seconds[side] for pair in row.pairs) for row in rows] for side in (0, 1)]
        inside, spent, similar = zip(*((row.denoiser_seconds, row.flops_share, row.ssim) for row in rows), strict=True)
        table = {
            "stack": list(self.compared),
            "ms without": list(map(in_ms, seconds[0])),
            "ms with": list(map(in_ms, seconds[1])),
            "times as fast": [f"{row.speedup:.2f}" for row in rows],
            "ms in the model": ["-" if value is None else in_ms(value) for value in inside],
            "FLOPs": ["-" if value is None else f"{value:.1%}" for value in spent],
            "PSNR, dB": [f"{row.psnr:.2f}" for row in rows],
            "SSIM": ["-" if value is None else f"{value:.4f}" for value in similar],
        }
        return {name: texts for name, texts in table.items() if set(texts) != {"-"}}

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as a JSON-ready dictionary."""
        stacks = {name: row.as_dict() for name, row in self.compared.items()}
        return {"machine": self.machine, "units": UNITS, "stacks": stacks}


def bench_pipeline(config: PipelineBenchConfig, stacks: Sequence[Stack], timed: bool) -> PipelineBench:
    """Draw the prompts without methods and with each stack.

    Args:
        config: the settings.
        stacks: at least one that has methods; those without are left out, since every stack is compared with the
            pipeline without methods.
        timed: draw the first prompt `rounds` times instead of every prompt once.

    Raises:
        TokdynError: the pipeline cannot be read, or a stack does not fit it.
    """
    acting = [stack for stack in stacks if stack.methods or stack.folder or stack.tail_drop or stack.uncond_tail_drop]
    if not acting:
        raise RecipeError(
            "there is no stack with methods to compare with the pipeline; give one, such as "
            '--stack "{name: cached, methods: [{method: FeatureCache, threshold: 0.2}]}".'
        )
    for stack in acting:
        if stack.model is not None:
            raise RecipeError(f"the stack {stack.name} names a model, but all stacks act on {config.model}; remove it.")
    for name in {"out"} if timed else {"rounds"}:
        if name in config.model_fields_set:
            what = "times and writes no files" if timed else "draws every prompt once"
            raise RecipeError(f"bench {'speed' if timed else 'quality'} of a pipeline {what}; leave out {name}.")
    if not timed:
        require_folder(config.out)
    settle_memory()
    device = open_device(config.device)
    pipe = open_pipeline(config.model, device, config.precision)
    calls = call_arguments(pipe, config)
    calls = calls[:1] * config.rounds if timed else calls
    for stack in acting:  # all of them fit before the first is measured
        attach(pipe, stack)
        unwrap(pipe)
    compared = {}
    for stack in acting:
        attach(pipe, stack)
        try:
            found = compare(pipe, None, calls, seed=config.seed)
        finally:
            unwrap(pipe)
        compared[stack.name] = replace(found, methods=stack.name)
    return PipelineBench(compared, describe(device))


def attach(pipe: Any, stack: Stack) -> None:
    """Attach the methods of a stack to all denoisers of a pipeline, or to each its own."""
    methods = stack.for_pipeline()
    if stack.folder is not None:
        load(pipe, stack.folder)
        if methods:
            unwrap(pipe)
            raise RecipeError(f"the stack {stack.name} has both folder and methods; give one of them for a pipeline.")
    else:
        wrap(pipe, methods)
    if stack.tail_drop or stack.uncond_tail_drop:
        branches = {"cond": stack.tail_drop, "uncond": stack.tail_drop}
        if stack.uncond_tail_drop is not None:
            branches["uncond"] = stack.uncond_tail_drop
        if not all(isinstance(value, float) for value in branches.values()):
            unwrap(pipe)
            raise RecipeError(f"the stack {stack.name} has a tail drop with points; a pipeline takes one share.")
        set_tail_drop(pipe, branches)  # type: ignore[arg-type]


def write_pipeline_page(
    config: PipelineBenchConfig, result: PipelineBench, further: Mapping[str, Html] | None = None
) -> tuple[Path, ...]:
    """Write quality.json, quality.html and, for each stack, pictures with its pairs side by side, eight on each.

    Args:
        config: the settings.
        result: the measurements.
        further: more sections of the page, by title.

    Returns:
        The paths of the files.
    """
    require_folder(config.out)
    content = {"settings": config.model_dump(mode="json"), **result.as_dict()}
    page, numbers = config.out / "quality.html", config.out / "quality.json"
    pictures = {}
    for place, (name, row) in enumerate(result.compared.items(), 1):
        paths = (config.out / f"pairs-{place}{f'-{page}' if page > 1 else ''}.png" for page in itertools.count(1))
        pictures[name] = [write_png(pixels, path) for pixels, path in zip(row.pages(), paths, strict=False)]
    with replacing(numbers) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    made = _page(config, result)
    for title, section in (further or {}).items():
        made.add(title, section)
    made.write(page)
    return numbers, page, *itertools.chain(*pictures.values())


def _page(config: PipelineBenchConfig, result: PipelineBench) -> Page:
    """Return the page: the table, and the pairs of each stack side by side."""
    settings = (f"{name} {value}" for name in _SHOWN if (value := getattr(config, name)) is not None)
    count = len(config.prompts)
    lead = (
        f"{count} prompt{'s' * (count > 1)}, from {title_of(config.prompts[0])}; pairs have the same noise. Settings: "
        f"{', '.join(settings)}; others are the pipeline's own."
    )
    page = Page(f"{config.model}, without methods and with them", lead, described(result.machine))
    note = (
        "Times are medians of whole calls, in turn; FLOPs are those of all prompts, relative to those without methods "
        f"({UNITS})."
    )
    page.add("Stacks", table(result.columns(), caption=note))
    for name, row in result.compared.items():
        sides = []
        for side, title in enumerate(("without methods", row.methods)):
            frames = [(pair.without, pair.acting)[side] for pair in row.pairs]
            texts = [f"{in_ms(pair.seconds[side])} ms" for pair in row.pairs]
            if side:
                texts = [f"{text}, PSNR {pair.psnr:.1f} dB" for text, pair in zip(texts, row.pairs, strict=True)]
            sides.append(Column(title, (), [each[len(each) // 2] for each in frames], texts))
        prompts = [pair.prompt for pair in row.pairs]
        page.add(name, side_by_side(sides, prompts, [f"seed {pair.seed}" for pair in row.pairs]))
    return page
