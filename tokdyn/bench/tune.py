"""Schedules for a FLOPs target: how budgets, merging, skipping and caching are best spread over the noise levels."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.attach.entry import attachment_of
from tokdyn.attach.sidecar import save
from tokdyn.bench.quality import QualityConfig, QualityResult, bench_quality
from tokdyn.bench.quality_page import write_page
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.bench.tune_search import Trial, Tuner, fitting, search, uniform
from tokdyn.bench.tune_settings import TuneConfig
from tokdyn.errors import InputError
from tokdyn.files import replacing, require_folder
from tokdyn.host import open_device, settle_memory
from tokdyn.recipe import yaml_text


@dataclass(frozen=True)
class TuneResult:
    """What `tune` found.

    Attributes:
        folder: with stack.yaml, tuned.json and what `tokdyn bench quality` writes.
        stack: the winner.
        trials: all that met the target, the best of the proxy first.
        quality: of the model as it is, the uniform schedule and the finalists.
    """

    folder: Path
    stack: Stack
    trials: tuple[Trial, ...]
    quality: QualityResult


def tune(config: TuneConfig) -> TuneResult:
    """Search a schedule for a share of the FLOPs, and measure the best of them against the uniform one.

    The proxy is the distance to the images that the model draws as it is, from the same seeds; what the finalists are
    ranked by is what `tokdyn bench quality` ranks by, on images of other seeds.

    Raises:
        TokdynError: the model does not open, or no schedule comes down to the target.
    """
    settle_memory()
    require_folder(config.out)
    opened = open_stack(Stack(name="as it is", model=config.model), ema=config.ema)
    opened.model.to(open_device(config.device))
    possible = fitting(opened, config.guidance != 1.0)
    refused = [knob for knob in config.knobs or () if knob not in possible]
    if refused:
        raise InputError(f"{refused[0]} is no knob of this model and sampler; it has {', '.join(possible)}.")
    tuner = Tuner(config, opened, config.knobs or possible)
    tuner.prepare()
    trials = search(tuner)
    plain = uniform(tuner, trials)
    others = [trial.stack for trial in trials if plain is None or trial.stack != plain.stack][: config.finalists]
    finalists = [stack.model_copy(update={"name": f"tuned {n + 1}"}) for n, stack in enumerate(others)]
    flat = [] if plain is None else [plain.stack.model_copy(update={"name": "uniform"})]
    shared = ("model", "count", "batch_size", "scheduler", "steps", "guidance", "held_out", "reference", "extractor")
    asked = {name: getattr(config, name) for name in (*shared, "out", "precision", "device", "ema")}
    measured = QualityConfig(seed=config.seed + config.images, rounds=0, **asked)
    quality = bench_quality(measured, [opened.stack, *flat, *finalists])
    write_page(measured, quality)
    winner = _winner([*finalists, *flat], quality)
    with replacing(config.out / "stack.yaml") as half:
        half.write_text(yaml_text.dump([_plain(winner)]), encoding="utf-8")
    chosen = open_stack(winner, ema=config.ema).model
    attachment = attachment_of(chosen)
    methods = None
    if attachment is not None and attachment.methods:
        methods = save(chosen, config.out / "methods")
    content = {
        "settings": config.model_dump(mode="json"),
        "units": "shares of the FLOPs; a multiply-add is 2",
        "winner": _plain(winner),
        "sample": sample_command(config, winner, methods),
        "trials": [{"flops": t.flops, "error": t.error, "stack": _plain(t.stack)} for t in trials],
    }
    with replacing(config.out / "tuned.json") as half:
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return TuneResult(config.out, winner, tuple(trials), quality)


def sample_command(config: TuneConfig, stack: Stack, methods: Path | None) -> str:
    """The command line that samples with a stack of tail drops and saved methods."""
    words = ["tokdyn", "sample", config.model, f"steps={config.steps}"]
    words += [f"scheduler={config.scheduler}"] if config.scheduler else []
    words += [f"guidance={config.guidance:g}"] if config.guidance != 1.0 else []
    flat = isinstance(stack.tail_drop, float)
    words += [f"{'tail_drop' if flat else 'drop_curve'}={_compact(stack.tail_drop)}"] if stack.tail_drop else []
    if stack.uncond_tail_drop is not None and config.guidance != 1.0:
        words.append(f"uncond_tail_drop={_compact(stack.uncond_tail_drop)}")
    words += [f"methods={methods}"] if methods is not None else []
    return shlex.join(words)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _winner(finalists: Sequence[Stack], quality: QualityResult) -> Stack:
    """The finalist of the best quality: that of the ranking, or else the highest PSNR."""
    rows = {row.name: row for row in quality.rows}

    def cost(stack: Stack) -> float:
        row = rows[stack.name]
        value = None if quality.quality is None else row.quality(quality.quality)
        return value if value is not None else -(row.psnr or 0.0)

    return min(finalists, key=cost).model_copy(update={"name": "tuned"})


def _plain(stack: Stack) -> dict[str, Any]:
    """A stack as YAML and JSON write it, without what is not set."""
    return {
        name: value
        for name, value in stack.model_dump(mode="json", exclude_defaults=True).items()
        if value not in (None, [])
    }
