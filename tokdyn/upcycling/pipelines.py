"""Training the methods of a wrapped transformer against what it says without them, on recorded calls.

For models that no recipe can train, such as those of text-to-image pipelines: `tokdyn.recording` keeps the calls of a
pipeline that draws images, and the model learns to answer them with fewer tokens as it does with all.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokdyn.attach.controls import losses
from tokdyn.attach.entry import attached, disabled
from tokdyn.attach.sidecar import save
from tokdyn.checkpoints.optimizer import load_optimizer, optimizer_tensors
from tokdyn.errors import CheckpointError, InputError, TokdynError
from tokdyn.files import replacing
from tokdyn.progress import progress
from tokdyn.section import Count, Positive, Section
from tokdyn.seeds import Stream, generator, seed_everything
from tokdyn.upcycling.distillation import normalised_mse

STATE, METRICS, METHODS, TRANSFORMER = "state.safetensors", "metrics.jsonl", "methods", "transformer"


class CallSettings(Section):
    """How a wrapped transformer learns from recorded calls.

    Attributes:
        steps: Optimizer steps.
        calls: Calls per step, drawn anew in every step.
        lr: Learning rate of AdamW, which has no weight decay here.
        warmup_steps: The rate rises linearly over this many steps.
        clip: Largest norm of the gradient.
        trained: "methods" trains their parts alone and needs no second model; "all" trains the transformer too.
        seed: Of the draws.
        checkpoint_every: Steps between checkpoints.
    """

    steps: Positive = 1000
    calls: Positive = 1
    lr: float = 1e-3
    warmup_steps: Count = 0
    clip: float = 1.0
    trained: Literal["methods", "all"] = "methods"
    seed: Count = 0
    checkpoint_every: Positive = 100


@dataclass(frozen=True)
class CallResult:
    """What `distil` did.

    Attributes:
        folder: with `methods` for `tokdyn.load`, and `transformer` if all of it was trained.
        rows: step, "output" (see `normalised_mse`) and the losses of the methods, by step.
    """

    folder: Path
    rows: tuple[dict[str, float], ...]


def distil(
    student: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    folder: str | Path,
    settings: CallSettings | None = None,
    *,
    teacher: nn.Module | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> CallResult:
    """Let a wrapped transformer answer recorded calls as its original does.

    Args:
        student: wrapped, such as `tokdyn.upcycle(pipe.transformer, "dc", target=4)`.
        calls: arguments by name, from `tokdyn.recording`.
        folder: for checkpoints, metrics and the result.
        settings: None takes the defaults.
        teacher: the original, frozen; None takes the student without its methods, while only these learn.
        resume: continue from the last checkpoint in the folder, bit for bit.
        facts: written to settings.json in the folder.

    Returns:
        The folder and the metrics of all steps.

    Raises:
        InputError: nothing to learn or to learn from, or no teacher where all of the transformer is trained.
        CheckpointError: the folder is in use, or holds nothing that can be continued.
    """
    settings, where = settings or CallSettings(), Path(folder).expanduser()
    parts = attached(student).parts
    if not calls:
        raise InputError("there are no calls to learn from; record some with tokdyn.recording.")
    if not len(parts):
        raise InputError("no method on this model has anything to learn; wrap it with Chunking, for example.")
    if settings.trained == "all" and teacher is None:
        raise InputError("trained='all' changes the model itself; give a copy of the original as teacher.")
    learning = list(parts.parameters()) if settings.trained == "methods" else list(student.parameters())
    before = {parameter: parameter.requires_grad for parameter in student.parameters()}
    chosen = set(learning)
    for parameter in before:
        parameter.requires_grad_(parameter in chosen)
    mode = student.training
    optimizer = torch.optim.AdamW(learning, lr=settings.lr, weight_decay=0.0)
    rows = _restored(where, student, optimizer, settings) if resume else fresh(where)
    if facts is not None:
        with replacing(where / "settings.json") as half:
            half.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    student.train()
    try:
        with progress("distilling", settings.steps - len(rows)) as advance:
            for step in range(len(rows), settings.steps):
                rows.append(_step(student, teacher, calls, optimizer, learning, settings, step))
                advance(1)
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                    _checkpoint(where, student, optimizer, settings, rows)
    finally:
        student.train(mode)
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
    save(student, where / METHODS)
    if settings.trained == "all":
        student.save_pretrained(where / TRANSFORMER)  # type: ignore[operator]
    return CallResult(where, tuple(rows))


def _step(
    student: nn.Module,
    teacher: nn.Module | None,
    calls: Sequence[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    learning: Sequence[nn.Parameter],
    settings: CallSettings,
    step: int,
) -> dict[str, float]:
    drawn = torch.randint(len(calls), (settings.calls,), generator=generator(settings.seed, Stream.BUDGET, step))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    means: dict[str, float] = {}
    for slot, index in enumerate(drawn.tolist()):
        call = calls[index]
        seed_everything(settings.seed, Stream.MICRO_STEP, step, slot)
        with torch.no_grad(), disabled(student) if teacher is None else nullcontext():
            wanted = _output((teacher or student)(**call))
        found = {"output": _error(_output(student(**call)), wanted)}
        found |= {name: value for name, value in losses(student).items() if value.requires_grad}
        torch.autograd.backward(sum(found.values(), torch.zeros((), device=wanted.device)) / settings.calls)
        for name, value in found.items():
            means[name] = means.get(name, 0.0) + value.item() / settings.calls
    norm = nn.utils.clip_grad_norm_(learning, settings.clip)
    if not (torch.isfinite(norm) and math.isfinite(means["output"])):
        raise TokdynError(
            f"the loss or its gradient is not finite in step {step + 1}; lower lr or lengthen warmup_steps."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"step": float(step + 1), **means}


def _output(returned: Any) -> Tensor:
    """The prediction in what a transformer returned."""
    first = getattr(returned, "sample", None)
    first = returned[0] if first is None else first
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """The error of a prediction over the variance of what is wanted, whatever its shape."""
    return normalised_mse(found.reshape(-1, 1), wanted.reshape(-1, 1))


def fresh(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run that begins in a folder: none, and nothing else may be there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty; resume what it holds, or choose another folder.")
    return []


def _weights(student: nn.Module, settings: CallSettings) -> nn.Module:
    return student if settings.trained == "all" else attached(student)


def _checkpoint(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: CallSettings,
    rows: Sequence[dict[str, float]],
) -> None:
    """Metrics first, of which a restart takes as many as the state says, then the state."""
    with replacing(folder / METRICS) as half:
        half.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = _weights(student, settings)
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(model, optimizer).items()}
    with replacing(folder / STATE) as half:
        content = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(content, half, {"step": str(len(rows)), "settings": settings.model_dump_json()})


def _restored(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, settings: CallSettings
) -> list[dict[str, float]]:
    from safetensors import SafetensorError, safe_open

    model = _weights(student, settings)
    try:
        with safe_open(folder / STATE, "pt") as file:
            facts = file.metadata()
        tensors = load_file(folder / STATE)
        stored, step = CallSettings.model_validate_json(facts["settings"]), int(facts["step"])
        rows = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no run that can be continued ({error}).") from error
    changed = [
        name for name, value in stored.model_dump().items()
        if value != getattr(settings, name) and name not in ("steps", "checkpoint_every")
    ]  # fmt: skip
    if changed or len(rows) < step:
        raise CheckpointError(
            f"{folder} was begun with other settings ({', '.join(changed) or 'its metrics are gone'}); set them back."
        )
    model.load_state_dict({n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")})
    load_optimizer(
        model, optimizer, {n.removeprefix("optimizer/"): v for n, v in tensors.items() if n.startswith("optimizer/")}
    )
    return rows[:step]
