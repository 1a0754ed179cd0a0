"""Upcycle the transformer of a text-to-image pipeline on images that the pipeline draws itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import nn

from tokdyn import __version__
from tokdyn.attach import accept_methods, attached, lora_tensors, require_peft, wrap
from tokdyn.cost import flops, stats
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import json_object, replacing, require_folder
from tokdyn.host import describe, free_memory, settle_memory
from tokdyn.pipelines import denoisers
from tokdyn.pipelines.drawing import call_arguments, draw
from tokdyn.pipelines.opening import open_pipeline
from tokdyn.prompts import title_of
from tokdyn.recorder import Call, evaluating, recording
from tokdyn.report.grids import image_grid
from tokdyn.report.pixels import write_png
from tokdyn.seeds import Stream, seed_everything
from tokdyn.upcycling.budgets import Budget, measure_budgets
from tokdyn.upcycling.conversion import attached_methods, check_method
from tokdyn.upcycling.memory import Memory, memory_of, size_of
from tokdyn.upcycling.page import page_of
from tokdyn.upcycling.pipeline_settings import PipelineConfig
from tokdyn.upcycling.pipelines import Calls, distil
from tokdyn.upcycling.processes import Processes, together
from tokdyn.upcycling.state import require_unused
from tokdyn.upcycling.streaming import DrawnCalls
from tokdyn.upcycling.students import prepare

REPORT, PICTURE, PAGE, BEGUN = "upcycle.json", "images.png", "upcycle.html", "settings.json"
_FREE = {"steps", "checkpoint_every", "gradient_checkpointing", "out", "device"}  # may change when a run is resumed
_COMPARED = 8  # recorded calls, at most, by which errors before and after are compared


@dataclass(frozen=True)
class PipelineResult:
    """The result of `upcycle_pipeline`.

    Attributes:
        folder: holds `methods.safetensors`, metrics, a report, a page and a picture of images before and after. Errors
            in the report are means over the first and the last tenth of the steps, and for each budget those of up to
            eight recorded calls before and after the training.
        report: content of upcycle.json; empty in all processes but the first.
    """

    folder: Path
    report: dict[str, Any]


def upcycle_pipeline(
    config: PipelineConfig, methods: list[str], resume: bool = False, tell: Callable[[str], None] = lambda text: None
) -> PipelineResult:
    """Draw images, record the calls of the transformer, and distil it against itself with all tokens.

    In processes that torchrun or accelerate have started, each computes a part of the calls of a step.

    Args:
        config: the settings.
        methods: "dc", "dydit" or both.
        resume: continue from the last checkpoint in the folder; the images are drawn again from the same seeds.
        tell: receives a summary before the first step: trained and frozen parameters, tokens and FLOPs of a call, and
            memory.

    Raises:
        TokdynError: the pipeline cannot be read or has several transformers, its transformer does not support the
            methods, the memory does not suffice, or peft is missing.
    """
    settle_memory()
    for name in methods:
        check_method(name)
    if config.trained == "lora":
        require_peft()
    with together(config.device) as device:
        return _upcycle(config, methods, resume, tell, device)


def _upcycle(
    config: PipelineConfig, methods: list[str], resume: bool, tell: Callable[[str], None], device: torch.device
) -> PipelineResult:
    """Do what `upcycle_pipeline` does, on this process's device."""
    processes, out = Processes.joined(), config.out or Path("upcycled") / Path(config.base).name
    require_folder(out)
    facts = {**config.model_dump(mode="json", exclude=_FREE), "methods": methods}
    _check_folder(out, resume, facts)
    processes.check_divides(config.calls)
    if config.tail_drops is not None and "dc" not in methods:
        raise InputError(
            "tail_drops has no effect without --method dc, since no tokens are dropped; remove it, or add dc."
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
    settings, count = config.distillation("dc" in methods), len(calls)
    seed_everything(config.seed, Stream.WEIGHTS)
    teacher = copy.deepcopy(pipe.transformer) if config.trained == "all" else None
    student = accept_methods(wrap(pipe.transformer.train(), attached_methods(methods, {"target": config.target})))
    prepare(student, settings, teacher)
    some = calls[:: -(-count // _COMPARED)]
    given: Calls = calls
    bytes_drawn = 0
    if config.steps_per_image is not None:
        bytes_drawn = size_of(calls) // len(drawn) * (settings.calls // processes.count)
        given = DrawnCalls(pipe, drawn, settings.calls, config.steps_per_image, config.seed + len(drawn))
        calls = some
    others = [each for name, each in pipe.components.items() if name != "transformer"]
    memory = _memory(device, student, settings, calls, others, teacher, processes.count, bytes_drawn)
    summary = _summary(student, calls[0], config, memory)
    if processes.first:
        tell("\n".join(f"{what:<12} {text}" for what, text in summary.items()))
    drops = settings.tail_drops or (None,)
    untrained = measure_budgets(student, some, drops, teacher) if processes.first else []
    if teacher is not None:
        pipe.transformer = teacher  # which draws while the student is trained
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = distil(student, given, out, settings, teacher=teacher, resume=resume, facts=facts)
    if not processes.first:
        return PipelineResult(out, {})
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    trained = measure_budgets(student, some, drops, teacher)
    pipe.transformer = student.eval()
    after = _draw(pipe, drawn, config.seed)
    titles = ["all tokens", "upcycled"]
    both = rearrange(np.stack([before, after]), "side prompt h w c -> (prompt side) h w c")
    row_titles = [title_of(prompt) for prompt in config.prompts]
    write_png(image_grid(both, columns=2, row_titles=row_titles, column_titles=titles), out / PICTURE)
    tenth = max(1, len(result.rows) // 10)
    report = {
        "tokdyn": __version__,
        "settings": config.model_dump(mode="json"),
        "methods": methods,
        "model": type(student).__name__,
        "before_the_first_step": summary,
        "calls": count,
        "error": {"first": _mean_error(result.rows[:tenth]), "last": _mean_error(result.rows[-tenth:])},
        "budgets": [_budget(*pair) for pair in zip(untrained, trained, strict=True)],
        "memory": {"worked_out": None if isinstance(memory, str) else asdict(memory), "measured": peak},
        "share_of_block_flops": stats(student).share,
        "processes": processes.count,
        "machine": describe(device),
    }
    with replacing(out / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page_of(report, result.rows, row_titles, list(before), list(after)).write(out / PAGE)
    return PipelineResult(out, report)


def _check_folder(out: Path, resume: bool, facts: Mapping[str, Any]) -> None:
    """Check that a run can begin or go on in a folder, before images are drawn in vain.

    Raises:
        CheckpointError: the folder is in use, or its run has other settings.
    """
    if not resume:
        require_unused(out)
    elif (out / BEGUN).is_file():
        changed = [
            name for name, value in json_object(out / BEGUN).items() if facts.get(name) != value and name not in _FREE
        ]
        if changed:
            raise CheckpointError(
                f"{out} was started with other settings; to resume it, set back {', '.join(changed)}."
            )


def _memory(device: torch.device, student: nn.Module, settings: Any, calls: Sequence[Call], *rest: Any) -> Memory | str:
    """Work out the memory of the training; if that is not possible, say why.

    Raises:
        InputError: the device has less.
    """
    try:
        memory = memory_of(student, settings, calls, *rest)
    except InputError:
        raise
    except Exception as error:  # operators of quantised layers and of others' code may not run without values
        return f"not worked out: {' '.join(str(error).split())[:120]}"
    missing, free = memory.moments + memory.step, free_memory(device)
    if missing > free:
        advice = "" if settings.gradient_checkpointing else "set gradient_checkpointing=true, "
        raise InputError(
            f"the training needs {missing / 2**30:.1f} GiB beside what is on {device} already, which has "
            f"{free / 2**30:.1f} GiB free; {advice}give a smaller height and width, or a quantised base."
        )
    return memory


def _summary(student: Any, call: Mapping[str, Any], config: PipelineConfig, memory: Memory | str) -> dict[str, str]:
    """Summarise which parameters are trained and frozen, what a call costs before and after, and the memory."""
    trained = {id(each): each for each in attached(student).parts.parameters()}
    with_lora = config.trained == "lora"
    if with_lora:
        trained |= {id(each): each for each in lora_tensors(student).values()}
    whole = sum(parameter.numel() for parameter in student.parameters() if id(parameter) not in trained)
    new = sum(parameter.numel() for parameter in trained.values())
    with evaluating(student):
        cost = flops(student, **call)
    names = [type(each).__name__ for each in attached(student).methods] + ["LoRA"] * with_lora
    lines = {
        "kept as is": f"{whole:,} parameters of the {type(student).__name__}",
        "new": f"{new:,} parameters ({', '.join(names)})",
        "frozen": "none; a copy of the original teaches" if config.trained == "all" else "all but the new ones",
    }
    if cost.dense:
        lines["call"] = (
            f"{cost.dense / cost.batch / 1e9:,.3f} GFLOPs per image before, {cost.per_image / 1e9:,.3f} after "
            f"({cost.total / cost.dense:.2f}x; a multiply-add is 2)"
        )
    return {**lines, "memory": str(memory)}


def _budget(before: Budget, after: Budget) -> dict[str, float | None]:
    """Return a budget as it is reported: its cost, and its errors before and after the training."""
    return {**asdict(after), "error": after.error, "error_before": before.error}


def _mean_error(rows: Sequence[dict[str, float]]) -> float:
    """Average the error of the output over some steps."""
    return sum(row["output"] for row in rows) / len(rows)


def _draw(pipe: Any, calls: Sequence[Mapping[str, Any]], seed: int) -> Any:
    """Draw one image per call, of a video the first frame: (P, H, W, 3) uint8."""
    return np.stack([draw(pipe, arguments, seed + number)[0] for number, arguments in enumerate(calls)])
