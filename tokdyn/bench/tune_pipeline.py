"""Tune methods on a pipeline of diffusers: those with the pictures closest to its own for a share of the FLOPs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from tokdyn.adapters import adapter_for
from tokdyn.attach import accept_methods, unsupported
from tokdyn.bench.pipelines import PipelineBench, attach, bench_pipeline, write_pipeline_page
from tokdyn.bench.settings import PipelineBenchConfig
from tokdyn.bench.stacks import Stack
from tokdyn.bench.tune_page import TITLE, trial_cards
from tokdyn.bench.tune_search import SHOWN, Drawn, Shape, Trial, Tuner, search, uniform_trial
from tokdyn.bench.tune_settings import PipelineKnob, PipelineTuneConfig
from tokdyn.errors import InputError, TokdynError
from tokdyn.files import replacing, require_folder, unused
from tokdyn.host import open_device, settle_memory
from tokdyn.methods import TokenMerge
from tokdyn.pipelines import denoisers, recording, save, stats, unwrap
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.prompts import Drawing
from tokdyn.recipe import yaml_text
from tokdyn.recorder import Call
from tokdyn.report.pixels import Pixels

_KNOBS: tuple[PipelineKnob, ...] = ("merge", "skip", "cache")
_SIDE = 128  # pixels, at most, of images on the page


@dataclass
class PipelineTuner(Tuner):
    """A pipeline with its knobs; see `Tuner`. FLOPs are those of blocks and methods, relative to blocks alone.

    Attributes:
        pipe: the pipeline, on its device.
        calls: the arguments of its call for each prompt.
    """

    config: PipelineTuneConfig
    pipe: Any = field(kw_only=True)
    calls: list[dict[str, Any]] = field(kw_only=True)

    def record(self) -> dict[str, tuple[nn.Module, list[Call]]]:
        """See `Tuner.record`."""
        models = denoisers(self.pipe)
        with recording(self.pipe, host=True) as calls:
            self.reference = _drawn([self._picture(place) for place in range(len(self.calls))], 1.0)
        self.denoisers = tuple(models)
        return {name: (model, calls[name]) for name, model in models.items()}

    def stack(self, shape: Shape, strength: float, name: str = "tuned") -> Stack:
        """Return the schedule of a shape multiplied by a strength, without a model."""
        return super().stack(shape, strength, name).model_copy(update={"model": None})

    def draw(self, stack: Stack) -> Drawn | None:
        """See `Tuner.draw`."""
        try:
            attach(self.pipe, stack)
        except TokdynError:
            return None
        for model in denoisers(self.pipe).values():  # what a trial falls short of, its FLOPs show
            accept_methods(model)
        images, spent, dense = [], 0, 0
        try:
            for place in range(len(self.calls)):
                images.append(self._picture(place))
                found = stats(self.pipe)
                spent, dense = spent + (found.flops or 0), dense + (found.dense_flops or 0)
        finally:
            unwrap(self.pipe)
        return _drawn(images, spent / dense)

    def _picture(self, place: int) -> Pixels:
        """Draw a prompt: (F, H, W, 3) uint8. Prompts may have sizes of their own."""
        return draw(self.pipe, self.calls[place], self.config.seed + place)


def _drawn(pictures: Sequence[Pixels], share: float) -> Drawn:
    """Return pictures (F, H, W, 3) as errors are measured on them and as they are shown, with their share of FLOPs."""
    pixels = torch.cat([torch.from_numpy(frames).flatten().float() for frames in pictures])
    small = [Image.fromarray(frames[len(frames) // 2]) for frames in pictures[:SHOWN]]
    for image in small:
        image.thumbnail((_SIDE, _SIDE))
    return Drawn(pixels, share, tuple(torch.from_numpy(np.array(image)) for image in small))


@dataclass(frozen=True)
class PipelineTuned:
    """The result of `tune_pipeline`.

    Attributes:
        folder: holds stack.yaml, the best schedule; methods, for `tokdyn sample` and `tokdyn.load`; prompts.json;
            tuned.json; and the files of `tokdyn bench quality`.
        stack: the best schedule.
        trials: all schedules of the search that met the target, the lowest error first.
        compared: the uniform schedule and the finalists beside the pipeline without methods.
        command: the shell command that draws the prompts, from the noise of the search, with the best schedule.
    """

    folder: Path
    stack: Stack
    trials: tuple[Trial, ...]
    compared: PipelineBench
    command: str


def tune_pipeline(config: PipelineTuneConfig) -> PipelineTuned:
    """Search schedules that meet a FLOPs target, and compare the best of them with the uniform one.

    The search minimises the squared distance to the pictures of the pipeline without methods from the same noise. The
    best are compared on other noise, by PSNR.

    Raises:
        TokdynError: the pipeline cannot be opened, a knob cannot be used with it, or no schedule meets the target.
    """
    settle_memory()
    require_folder(config.out)
    pipe = open_pipeline(config.model, open_device(config.device), config.precision)
    usable = tuple(knob for knob in _KNOBS if knob != "merge" or _merges(pipe))
    unusable = [knob for knob in config.knobs or () if knob not in usable]
    if unusable:
        raise InputError(f"the knob {unusable[0]} cannot be used with this model; choose from {', '.join(usable)}.")
    tuner = PipelineTuner(config, config.knobs or usable, pipe=pipe, calls=call_arguments(pipe, config))
    tuner.prepare()
    trials = search(tuner)
    plain = uniform_trial(tuner, trials)
    others = [trial.stack for trial in trials if plain is None or trial.stack != plain.stack][: config.finalists]
    finalists = [stack.model_copy(update={"name": f"tuned {n + 1}"}) for n, stack in enumerate(others)]
    uniform = [] if plain is None else [plain.stack.model_copy(update={"name": "uniform"})]
    shared = {name: getattr(config, name) for name in (*Drawing.model_fields, "model", "out", "precision", "device")}
    measured = PipelineBenchConfig(**{**shared, "seed": config.seed + len(config.prompts)})
    compared = bench_pipeline(measured, [*uniform, *finalists], timed=False)
    cards = trial_cards(tuner.reference, trials, lambda shown: [each.numpy() for each in shown])
    write_pipeline_page(measured, compared, {TITLE: cards})
    name = max(compared.compared, key=lambda each: compared.compared[each].psnr)
    winner = next(stack for stack in (*uniform, *finalists) if stack.name == name).model_copy(update={"name": "tuned"})
    attach(pipe, winner)
    methods = save(pipe, config.out / "methods")
    content = winner.model_dump(mode="json", exclude_defaults=True)
    with replacing(config.out / "stack.yaml") as temporary:
        temporary.write_text(yaml_text.dump([content]), encoding="utf-8")
    command = _command(config, methods)
    record = {
        "settings": config.model_dump(mode="json"),
        "units": "shares of the FLOPs of the blocks; a multiply-add is 2",
        "winner": content,
        "sample": command,
        "trials": [
            {"flops": t.flops, "error": t.error, "stack": t.stack.model_dump(mode="json", exclude_defaults=True)}
            for t in trials
        ],
        "compared": compared.as_dict(),
    }
    with replacing(config.out / "tuned.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return PipelineTuned(config.out, winner, tuple(trials), compared, command)


def _merges(pipe: Any) -> bool:
    """Return whether tokens can be merged in all denoisers."""
    return all(unsupported(adapter_for(model), TokenMerge()) is None for model in denoisers(pipe).values())


def _command(config: PipelineTuneConfig, methods: Path) -> str:
    """Return the shell command that draws the prompts, from the noise of the search, with the methods that were found.

    The prompts are written to prompts.json beside the methods, with absolute paths of their images. It draws into a
    folder that does not exist yet.
    """
    prompts = config.out / "prompts.json"
    with replacing(prompts) as temporary:
        temporary.write_text(json.dumps(config.prompts, indent=1) + "\n", encoding="utf-8")
    words = ["tokdyn", "sample", config.model, f"methods={methods}", f"prompts={prompts}", f"seed={config.seed}"]
    for name in ("steps", "guidance", "height", "width", "frames", "precision", "device"):
        value = getattr(config, name)
        words += [] if value == type(config).model_fields[name].default else [f"{name}={value}"]
    return shlex.join([*words, f"out={unused(config.out / 'drawn')}"])
