"""Train a wrapped transformer on recorded calls to predict what it predicts without its methods.

This is for models that no recipe trains, such as those of text-to-image pipelines: `tokdyn.recording` keeps the
arguments of the calls that a pipeline makes while it draws, and the transformer learns to answer them with fewer tokens
as it does with all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokdyn.attach import attached, disabled, losses, save
from tokdyn.checkpoints.optimizer import load_optimizer, optimizer_tensors
from tokdyn.errors import CheckpointError, InputError, TokdynError
from tokdyn.files import replacing, user_path
from tokdyn.ownership import holds_nothing, owning
from tokdyn.progress import progress
from tokdyn.section import Count, Positive, Section
from tokdyn.seeds import Stream, generator, seed_everything
from tokdyn.upcycling.distillation import normalised_mse

STATE, METRICS, METHODS, TRANSFORMER = "state.safetensors", "metrics.jsonl", "methods", "transformer"


class DistilSettings(Section):
    """How a wrapped transformer is trained on recorded calls.

    Attributes:
        steps: Optimizer steps.
        calls: Recorded calls per step, drawn anew in every step.
        lr: Learning rate of AdamW, which has no weight decay here.
        warmup_steps: Steps over which the learning rate rises linearly to `lr`.
        clip: Largest norm of the gradient.
        trained: "methods" trains only the parameters of the methods and needs no second model; "all" trains the
            transformer too.
        seed: Seed of the draws.
        checkpoint_every: Steps between checkpoints.
    """

    steps: Positive = 1000
    calls: Positive = 1
    lr: PositiveFloat = 1e-3
    warmup_steps: Count = 0
    clip: PositiveFloat = 1.0
    trained: Literal["methods", "all"] = "methods"
    seed: Count = 0
    checkpoint_every: Positive = 100


@dataclass(frozen=True)
class DistilResult:
    """What `distil` wrote and measured.

    Attributes:
        folder: Holds `methods` for `tokdyn.load`, and `transformer` if all of it was trained.
        rows: Metrics of every step: "step", "output" (see `normalised_mse`) and the losses of the methods.
    """

    folder: Path
    rows: tuple[dict[str, float], ...]


def distil(
    student: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    folder: str | Path,
    settings: DistilSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> DistilResult:
    """Train a wrapped transformer to answer recorded calls as the original does.

    Args:
        student: The wrapped transformer, such as `tokdyn.upcycle(pipe.transformer, "dc", target=4)`.
        calls: Arguments of the recorded calls by name, from `tokdyn.recording`.
        folder: Receives checkpoints, metrics and the result.
        settings: None takes the defaults.
        teacher: The original model. None takes the student with its methods disabled, which is possible while only the
            methods are trained.
        resume: Continue from the last checkpoint in the folder, bit for bit.
        facts: Written to settings.json in the folder.

    Returns:
        The folder and the metrics of all steps.

    Raises:
        InputError: There are no calls, no method has parameters, or the whole transformer is to be trained without a
            teacher.
        OutputError: The folder is in use by another process.
        CheckpointError: The folder is not empty, or holds no run that can be continued.
        TokdynError: The loss or its gradient is no longer finite.
    """
    settings, out = settings or DistilSettings(), user_path(folder)
    if not resume:
        require_unused(out)
    parts = attached(student).parts
    if not calls:
        raise InputError("calls is empty; record some with tokdyn.recording.")
    if not len(parts):
        raise InputError(
            "none of the methods on this model has parameters to train; wrap it with Chunking, for example."
        )
    if settings.trained == "all" and teacher is None:
        raise InputError("trained='all' changes the transformer itself; give a copy of the original as teacher.")
    trained = list(parts.parameters()) if settings.trained == "methods" else list(student.parameters())
    required_grad = {parameter: parameter.requires_grad for parameter in student.parameters()}
    trained_set = set(trained)
    for parameter in required_grad:
        parameter.requires_grad_(parameter in trained_set)
    mode = student.training
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)  # every step sets the rate
    with owning(out):
        rows = _restore(out, student, optimizer, settings) if resume else []
        if facts is not None:
            with replacing(out / "settings.json") as half:
                half.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        student.train()
        try:
            with progress("distilling", settings.steps - len(rows)) as advance:
                for step in range(len(rows), settings.steps):
                    rows.append(_step(student, teacher, calls, optimizer, trained, settings, step))
                    advance(1)
                    if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                        _checkpoint(out, student, optimizer, settings, rows)
        finally:
            student.train(mode)
            for parameter, required in required_grad.items():
                parameter.requires_grad_(required)
        save(student, out / METHODS)
        if settings.trained == "all":
            student.save_pretrained(out / TRANSFORMER)  # type: ignore[operator]
        return DistilResult(out, tuple(rows))


def _step(
    student: nn.Module,
    teacher: nn.Module | None,
    calls: Sequence[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
    settings: DistilSettings,
    step: int,
) -> dict[str, float]:
    """Take an optimizer step and return its metrics."""
    drawn = torch.randint(len(calls), (settings.calls,), generator=generator(settings.seed, Stream.BUDGET, step))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    means: dict[str, float] = {}
    for slot, index in enumerate(drawn.tolist()):
        call = calls[index]
        seed_everything(settings.seed, Stream.MICRO_STEP, step, slot)
        with torch.no_grad(), disabled(student) if teacher is None else nullcontext():
            target = _prediction((teacher or student)(**call))
        terms = {"output": _error(_prediction(student(**call)), target)}
        terms |= {name: value for name, value in losses(student).items() if value.requires_grad}
        torch.autograd.backward(sum(terms.values(), torch.zeros((), device=target.device)) / settings.calls)
        for name, value in terms.items():
            means[name] = means.get(name, 0.0) + value.item() / settings.calls
    norm = nn.utils.clip_grad_norm_(trained, settings.clip)
    if not (torch.isfinite(norm) and math.isfinite(means["output"])):
        raise TokdynError(
            f"the loss or its gradient is not finite in step {step + 1}; lower lr or lengthen warmup_steps."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": float(step + 1), **means}


def _prediction(returned: Any) -> Tensor:
    """Return the prediction from the output of a transformer; some return a list with a tensor per sample."""
    first = getattr(returned, "sample", None)  # outputs of tokdyn.DiT have no indices, and tuples no names
    first = returned[0] if first is None else first
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of a prediction over the variance of all elements of the target."""
    return normalised_mse(prediction.reshape(-1, 1), target.reshape(-1, 1))


def require_unused(folder: Path) -> None:
    """Reject a folder that holds anything.

    Raises:
        CheckpointError: It is a file or a folder that is not empty.
    """
    if folder.exists() and not (folder.is_dir() and holds_nothing(folder)):
        raise CheckpointError(f"{folder} is not empty; continue the run in it with resume, or choose another folder.")


def _trained_module(student: nn.Module, settings: DistilSettings) -> nn.Module:
    return student if settings.trained == "all" else attached(student)


def _checkpoint(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: DistilSettings,
    rows: Sequence[dict[str, float]],
) -> None:
    """Write the metrics, then the state; a run that stops in between resumes with as many rows as the state names."""
    with replacing(folder / METRICS) as half:
        half.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = _trained_module(student, settings)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(model, optimizer).items()}
    with replacing(folder / STATE) as half:
        content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(content, half, {"step": str(len(rows)), "settings": settings.model_dump_json()})


def _restore(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, settings: DistilSettings
) -> list[dict[str, float]]:
    """Load the last checkpoint into student and optimizer, and return the metrics of the steps before it."""
    model = _trained_module(student, settings)
    try:
        with safe_open(folder / STATE, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / STATE)
        stored, step = DistilSettings.model_validate_json(metadata["settings"]), int(metadata["step"])
        rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no run that can be continued ({error}).") from error
    changed = [
        name for name, value in stored.model_dump().items()
        if value != getattr(settings, name) and name not in ("steps", "checkpoint_every")
    ]  # fmt: skip
    if changed:
        raise CheckpointError(
            f"{folder} was started with other settings of {', '.join(changed)}; set them back to resume it."
        )
    if len(rows) < step:
        raise CheckpointError(
            f"{folder / METRICS} has {len(rows)} rows for {step} steps, so the run cannot be continued; start it "
            "again in another folder."
        )
    try:
        model.load_state_dict({n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")})
    except RuntimeError as error:
        raise CheckpointError(f"{folder / STATE} does not belong to this model: {error}") from error
    load_optimizer(
        model, optimizer, {n.removeprefix("optimizer/"): v for n, v in tensors.items() if n.startswith("optimizer/")}
    )
    return rows[:step]
