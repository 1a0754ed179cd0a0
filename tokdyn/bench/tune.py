"""Tune a schedule for a FLOPs target: how tail drop, merging, skipping and caching spread over the noise levels."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.attach import attachment_of, save
from tokdyn.bench.quality import QualityConfig, QualityResult, bench_quality
from tokdyn.bench.quality_page import write_page
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.bench.tune_search import Trial, Tuner, search, uniform_trial, usable_knobs
from tokdyn.bench.tune_settings import TuneConfig
from tokdyn.errors import InputError
from tokdyn.files import replacing, require_folder
from tokdyn.host import open_device, settle_memory
from tokdyn.recipe import yaml_text


@dataclass(frozen=True)
class TuneResult:
    """The result of `tune`.

    Attributes:
        folder: holds stack.yaml, tuned.json and the files of `tokdyn bench quality`.
        stack: the best schedule.
        trials: all schedules that met the target, best proxy error first.
        quality: measurements of the unmodified model, the uniform schedule and the finalists.
    """

    folder: Path
    stack: Stack
    trials: tuple[Trial, ...]
    quality: QualityResult


def tune(config: TuneConfig) -> TuneResult:
    """Search schedules that meet a FLOPs target, and measure the best of them against the uniform one.

    The search minimises the distance to the images of the unmodified model from the same seeds. The finalists are then
    ranked like any stacks of `tokdyn bench quality`, on images from other seeds.

    Raises:
        TokdynError: the model cannot be opened, or no schedule meets the target.
    """
    settle_memory()
    require_folder(config.out)
    opened = open_stack(Stack(name="unmodified", model=config.model), ema=config.ema)
    opened.model.to(open_device(config.device))
    usable = usable_knobs(opened, config.guidance != 1.0)
    unusable = [knob for knob in config.knobs or () if knob not in usable]
    if unusable:
        raise InputError(f"this model and sampler have no knob {unusable[0]}; knobs can be {', '.join(usable)}.")
    tuner = Tuner(config, opened, config.knobs or usable)
    tuner.prepare()
    trials = search(tuner)
    plain = uniform_trial(tuner, trials)
    others = [trial.stack for trial in trials if plain is None or trial.stack != plain.stack][: config.finalists]
    finalists = [stack.model_copy(update={"name": f"tuned {n + 1}"}) for n, stack in enumerate(others)]
    uniform = [] if plain is None else [plain.stack.model_copy(update={"name": "uniform"})]
    shared = ("model", "count", "batch_size", "scheduler", "steps", "guidance", "held_out", "reference", "extractor")
    settings = {name: getattr(config, name) for name in (*shared, "out", "precision", "device", "ema")}
    measured = QualityConfig(seed=config.seed + config.images, rounds=0, **settings)
    quality = bench_quality(measured, [opened.stack, *uniform, *finalists])
    write_page(measured, quality)
    winner = _best([*finalists, *uniform], quality)
    with replacing(config.out / "stack.yaml") as temporary:
        temporary.write_text(yaml_text.dump([_set_fields(winner)]), encoding="utf-8")
    model = open_stack(winner, ema=config.ema).model
    attachment = attachment_of(model)
    methods = None
    if attachment is not None and attachment.methods:
        methods = save(model, config.out / "methods")
    content = {
        "settings": config.model_dump(mode="json"),
        "units": "shares of the FLOPs; a multiply-add is 2",
        "winner": _set_fields(winner),
        "sample": sample_command(config, winner, methods),
        "trials": [{"flops": t.flops, "error": t.error, "stack": _set_fields(t.stack)} for t in trials],
    }
    with replacing(config.out / "tuned.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return TuneResult(config.out, winner, tuple(trials), quality)


def sample_command(config: TuneConfig, stack: Stack, methods: Path | None) -> str:
    """Build the command line that samples with a stack of tail drops and saved methods."""
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


def _best(finalists: Sequence[Stack], quality: QualityResult) -> Stack:
    """Return the finalist that ranks best, or the one with the highest PSNR if nothing ranks them."""
    rows = {row.name: row for row in quality.rows}

    def cost(stack: Stack) -> float:
        row = rows[stack.name]
        value = None if quality.quality is None else row.quality(quality.quality)
        return value if value is not None else -(row.psnr or 0.0)

    return min(finalists, key=cost).model_copy(update={"name": "tuned"})


def _set_fields(stack: Stack) -> dict[str, Any]:
    """Dump a stack for YAML and JSON without the fields that are not set."""
    return {
        name: value
        for name, value in stack.model_dump(mode="json", exclude_defaults=True).items()
        if value not in (None, [])
    }
