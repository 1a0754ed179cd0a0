"""Tune a schedule: find how strongly tail drop, merging, skipping and caching should act at each noise level.

A schedule is a stack (a list of methods with a tail drop) whose settings may change with the noise level. Tuning looks
for the one with the best images among those that meet a FLOPs target.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokdyn.attach import attachment_of, save
from tokdyn.bench.quality import QualityResult, bench_quality
from tokdyn.bench.quality_page import write_page
from tokdyn.bench.settings import QualityConfig
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.bench.tune_page import TITLE, trial_cards
from tokdyn.bench.tune_search import ModelTuner, Trial, search, uniform_trial, usable_knobs
from tokdyn.bench.tune_settings import TuneConfig
from tokdyn.errors import InputError
from tokdyn.files import replacing, require_folder, unused
from tokdyn.host import open_device, settle_memory
from tokdyn.recipe import yaml_text
from tokdyn.report.decoding import open_decoder


@dataclass(frozen=True)
class TuneResult:
    """The result of `tune`.

    Attributes:
        folder: folder with stack.yaml (the best schedule), tuned.json and the files of `tokdyn bench quality`.
        stack: the best schedule.
        trials: all schedules of the search that met the target, the lowest error first.
        quality: measurements of the unmodified model, of the uniform schedule (with constant settings), and of the
            finalists, the schedules with the lowest errors.
    """

    folder: Path
    stack: Stack
    trials: tuple[Trial, ...]
    quality: QualityResult


def tune(config: TuneConfig) -> TuneResult:
    """Search schedules that meet a FLOPs target, and compare the best of them with the uniform one.

    The search minimises the squared distance to the unmodified model's images from the same seeds. The schedules with
    the lowest errors, the finalists, are then compared by `bench_quality` on images from other seeds, together with the
    uniform schedule, which has the same settings at all noise levels. All files are written to `config.out`.

    Raises:
        TokdynError: the model cannot be opened, a knob cannot be used with it, or no schedule meets the target.
    """
    settle_memory()
    require_folder(config.out)
    opened = open_stack(Stack(name="unmodified", model=config.model), ema=config.ema)
    device = open_device(config.device)
    opened.model.to(device)
    usable = usable_knobs(opened, config.guidance != 1.0)
    unusable = [knob for knob in config.knobs or () if knob not in usable]
    if unusable:
        raise InputError(
            f"The knob {unusable[0]} cannot be used with this model and sampler: choose knobs from {', '.join(usable)}."
        )
    tuner = ModelTuner(config, config.knobs or usable, opened=opened)
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
    info = opened.info
    decoder = open_decoder(opened.model.config.in_channels, info.data, None, device, info.latents)
    cards = trial_cards(tuner.reference, trials, lambda shown: list(decoder(torch.stack(shown))))
    write_page(measured, quality, {TITLE: cards})
    winner = _best([*finalists, *uniform], quality)
    with replacing(config.out / "stack.yaml") as temporary:
        temporary.write_text(yaml_text.dump([_without_defaults(winner)]), encoding="utf-8")
    model = open_stack(winner, ema=config.ema).model
    attachment = attachment_of(model)
    methods = None
    if attachment is not None and attachment.methods:
        methods = save(model, config.out / "methods")
    content = {
        "settings": config.model_dump(mode="json"),
        "units": "shares of the FLOPs; a multiply-add is 2",
        "winner": _without_defaults(winner),
        "sample": sample_command(config, winner, methods),
        "trials": [{"flops": t.flops, "error": t.error, "stack": _without_defaults(t.stack)} for t in trials],
    }
    with replacing(config.out / "tuned.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return TuneResult(config.out, winner, tuple(trials), quality)


def sample_command(config: TuneConfig, stack: Stack, methods: Path | None) -> str:
    """Return the shell command that samples with a schedule, into a folder that does not exist yet.

    Args:
        config: the settings of the search, of which the sampler's are used.
        stack: the schedule, whose tail drops are written as settings.
        methods: folder that its methods were saved to; None if it has none.
    """
    words = ["tokdyn", "sample", config.model, f"steps={config.steps}"]
    words += [f"scheduler={config.scheduler}"] if config.scheduler else []
    words += [f"guidance={config.guidance}"] if config.guidance != 1.0 else []
    flat = isinstance(stack.tail_drop, float)
    words += [f"{'tail_drop' if flat else 'drop_curve'}={_compact(stack.tail_drop)}"] if stack.tail_drop else []
    if stack.uncond_tail_drop is not None and config.guidance != 1.0:
        words.append(f"uncond_tail_drop={_compact(stack.uncond_tail_drop)}")
    words += [f"methods={methods}"] if methods is not None else []
    words += [f"precision={config.precision}"] if config.precision != "auto" else []
    words += [f"device={config.device}"] if config.device != "auto" else []
    words += [] if config.ema else ["ema=false"]
    return shlex.join([*words, f"out={unused(config.out / 'drawn')}"])


def _compact(value: Any) -> str:
    """Return a value as JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def _best(finalists: Sequence[Stack], quality: QualityResult) -> Stack:
    """Return the finalist with the best value of the measurement that ranks stacks; without one, the highest PSNR."""
    rows = {row.name: row for row in quality.rows}

    def cost(stack: Stack) -> float:
        row = rows[stack.name]
        value = None if quality.quality is None else row.quality(quality.quality)
        return value if value is not None else -(row.psnr or 0.0)

    return min(finalists, key=cost).model_copy(update={"name": "tuned"})


def _without_defaults(stack: Stack) -> dict[str, Any]:
    """Return a stack as JSON data, without settings that have their default."""
    return {
        name: value
        for name, value in stack.model_dump(mode="json", exclude_defaults=True).items()
        if value not in (None, [])
    }
