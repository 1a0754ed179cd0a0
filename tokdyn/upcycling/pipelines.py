"""Train a wrapped transformer on calls of a pipeline to predict what it predicts without its methods.

This is for models that no recipe trains, such as those of text-to-image pipelines: `tokdyn.recording` keeps the
arguments of the calls that a pipeline makes while it draws, and the transformer learns to answer them with fewer tokens
as it does with all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokdyn.attach import save
from tokdyn.errors import InputError, TokdynError
from tokdyn.files import replacing, user_path
from tokdyn.ownership import owning
from tokdyn.progress import progress
from tokdyn.seeds import Stream, generator, seed_everything
from tokdyn.upcycling.distil_settings import DistilSettings
from tokdyn.upcycling.processes import Processes
from tokdyn.upcycling.state import read_state, require_unused, write_state
from tokdyn.upcycling.students import losses_of, prepare, target_of, training

METHODS, TRANSFORMER = "methods.safetensors", "transformer"
Call = Mapping[str, Any]
Calls = Sequence[Call] | Callable[[int, int], Sequence[Call]]
"""Arguments of recorded calls by name; or a function that returns those to draw from in a step, for a place in it."""


@dataclass(frozen=True)
class DistilResult:
    """What `distil` wrote and measured.

    Attributes:
        folder: Holds `methods.safetensors` for `tokdyn.load`, and `transformer` if all of it was trained.
        rows: Metrics of every step: "step", "output" (see `normalised_mse`), the losses of the methods, and with
            `tail_drops` their mean in "tail_drop".
    """

    folder: Path
    rows: tuple[dict[str, float], ...]


def distil(
    student: nn.Module,
    calls: Calls,
    folder: str | Path,
    settings: DistilSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> DistilResult:
    """Train a wrapped transformer to answer calls as the original does.

    If `torch.distributed` is initialised, its processes train together, and the first one writes. Each gets the same
    student and the same calls, and computes a part of those of a step.

    Args:
        student: The wrapped transformer, such as `tokdyn.upcycle(pipe.transformer, "dc", target=4)`. With
            trained="lora" it gets LoRA, unless it has some already, which is then trained further.
        calls: Arguments of the recorded calls by name, from `tokdyn.recording`. Or a function of the step and of the
            place in it, which returns those to draw from; it must return the same whenever it is asked.
        folder: Receives checkpoints, metrics and the result.
        settings: None takes the defaults.
        teacher: The original model. None takes the student with its methods and its LoRA disabled, which is possible
            as long as its own weights are not trained.
        resume: Continue from the last checkpoint in the folder, bit for bit.
        facts: Written to settings.json in the folder.

    Returns:
        The folder and the metrics of all steps.

    Raises:
        InputError: There are no calls, no method has parameters, a setting does not fit the model or the number of
            processes, or the whole transformer is to be trained without a teacher.
        OutputError: The folder is in use by another process.
        CheckpointError: The folder is not empty, or holds no run that can be continued.
        TokdynError: The loss or its gradient is no longer finite.
    """
    settings, out, processes = settings or DistilSettings(), user_path(folder), Processes.joined()
    if not resume:
        require_unused(out)
    if not callable(calls) and not calls:
        raise InputError("calls is empty; record some with tokdyn.recording.")
    trained = prepare(student, settings, teacher)
    processes.check_divides(settings.calls)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)  # every step sets the rate
    with owning(out) if processes.first else nullcontext():
        rows = read_state(out, student, optimizer, settings) if resume else []
        processes.wait()  # nobody writes before all have looked
        if facts is not None and processes.first:
            with replacing(out / "settings.json") as half:
                half.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shown = progress("distilling", settings.steps - len(rows)) if processes.first else nullcontext(lambda _: None)
        with training(student, settings, trained), shown as advance:
            for step in range(len(rows), settings.steps):
                rows.append(_step(student, teacher, calls, optimizer, trained, settings, step, processes))
                advance(1)
                if processes.first and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps):
                    write_state(out, student, optimizer, settings, rows)
        if processes.first:
            save(student, out / METHODS)
            if settings.trained == "all":
                student.save_pretrained(out / TRANSFORMER)  # type: ignore[operator]
    processes.wait()
    return DistilResult(out, tuple(rows))


def _step(
    student: nn.Module,
    teacher: nn.Module | None,
    calls: Calls,
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
    settings: DistilSettings,
    step: int,
    processes: Processes,
) -> dict[str, float]:
    """Take an optimizer step and return its metrics, which are means over the calls of all processes."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    means: dict[str, float] = {}
    for slot in range(processes.rank, settings.calls, processes.count):
        call, drop = _drawn(calls, settings, step, slot)
        seed_everything(settings.seed, Stream.MICRO_STEP, step, slot)
        terms = losses_of(student, target_of(student, teacher, call), call, drop)
        torch.autograd.backward(sum(terms.values(), torch.zeros_like(terms["output"])) / settings.calls)
        values = {name: value.item() for name, value in terms.items()}
        for name, value in (values if drop is None else {**values, "tail_drop": drop}).items():
            means[name] = means.get(name, 0.0) + value / settings.calls
    processes.add_gradients(trained)
    means = processes.add(means, trained[0].device)
    norm = nn.utils.clip_grad_norm_(trained, settings.clip)
    if not (torch.isfinite(norm) and math.isfinite(means["output"])):
        raise TokdynError(
            f"the loss or its gradient is not finite in step {step + 1}; lower lr or lengthen warmup_steps."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": float(step + 1), **means}


def _drawn(calls: Calls, settings: DistilSettings, step: int, slot: int) -> tuple[Call, float | None]:
    """Return the call and the tail drop that are drawn for a place in a step."""
    if callable(calls):
        found = calls(step, slot)
        index = int(torch.randint(len(found), (), generator=generator(settings.seed, Stream.BUDGET, step, slot, 0)))
    else:
        found, draws = calls, generator(settings.seed, Stream.BUDGET, step)
        index = int(torch.randint(len(found), (settings.calls,), generator=draws)[slot])
    drops = settings.tail_drops
    if drops is None:
        return found[index], None
    place = torch.randint(len(drops), (), generator=generator(settings.seed, Stream.BUDGET, step, slot, 1))
    return found[index], drops[int(place)]
