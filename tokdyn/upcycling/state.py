"""Write and read what a distillation needs to go on where it stopped: trained tensors, the optimizer's, and metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokdyn.attach import attached, load_trained_tensors, trained_tensors
from tokdyn.checkpoints.optimizer import load_optimizer, optimizer_tensors
from tokdyn.errors import CheckpointError
from tokdyn.files import replacing
from tokdyn.ownership import holds_nothing
from tokdyn.upcycling.distil_settings import DistilSettings

STATE, METRICS = "state.safetensors", "metrics.jsonl"
_FREE = ("steps", "checkpoint_every", "gradient_checkpointing")  # may change when a run is resumed


def require_unused(folder: Path) -> None:
    """Reject a folder that holds anything.

    Raises:
        CheckpointError: It is a file or a folder that is not empty.
    """
    if folder.exists() and not (folder.is_dir() and holds_nothing(folder)):
        raise CheckpointError(f"{folder} is not empty; continue the run in it with resume, or choose another folder.")


def write_state(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: DistilSettings,
    rows: Sequence[dict[str, float]],
) -> None:
    """Write the metrics, then the state; a run that stops in between resumes with as many rows as the state names.

    The state has a SHA-256 of its tensors, its settings and these rows.
    """
    lines = [json.dumps(row) for row in rows]
    with replacing(folder / METRICS) as half:
        half.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    held: dict[str, Tensor] = student.state_dict() if settings.trained == "all" else trained_tensors(student)
    tensors = {f"model/{name}": value for name, value in held.items()}
    owner = _owner(student, settings)
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(owner, optimizer).items()}
    with replacing(folder / STATE) as half:
        content = _apart(tensors)
        facts = {"step": str(len(rows)), "settings": settings.model_dump_json()}
        save_file(content, half, {**facts, "digest": _digest(content, facts, lines)})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors on the CPU that share no storage, as safetensors wants them; copies only where they do."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        here = value.detach().cpu().contiguous()
        storage = here.untyped_storage()
        found[name] = here.clone() if storage.nbytes() > here.nbytes or storage.data_ptr() in taken else here
        taken.add(storage.data_ptr())
    return found


def read_state(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, settings: DistilSettings
) -> list[dict[str, float]]:
    """Load the last checkpoint into student and optimizer, and return the metrics of the steps before it.

    Raises:
        CheckpointError: The folder holds no run that can be continued with these settings.
    """
    try:
        with safe_open(folder / STATE, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / STATE)
        stored, step = type(settings).model_validate_json(metadata["settings"]), int(metadata["step"])
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no run that can be continued ({error}).") from error
    changed = [
        name for name, value in stored.model_dump().items() if value != getattr(settings, name) and name not in _FREE
    ]
    if changed:
        raise CheckpointError(
            f"{folder} was started with other settings of {', '.join(changed)}; set them back to resume it."
        )
    if len(rows) < step:
        raise CheckpointError(
            f"{folder / METRICS} has {len(rows)} rows for {step} steps, so the run cannot be continued; start it "
            "again in another folder."
        )
    digest = metadata.pop("digest", None)  # that of an earlier version has none
    if digest is not None and digest != _digest(tensors, metadata, lines[:step]):
        raise CheckpointError(
            f"{folder / STATE} or {METRICS} beside it was damaged or changed after it was written, so the run cannot "
            "be continued; put back a copy of both, or start it again in another folder."
        )
    held = _named("model/", tensors)
    try:
        if settings.trained == "all":
            student.load_state_dict(held)
        else:
            load_trained_tensors(student, held)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{folder / STATE} was written for another model or other methods ({why}).") from error
    load_optimizer(_owner(student, settings), optimizer, _named("optimizer/", tensors))
    return rows[:step]


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str], lines: Sequence[str]) -> str:
    """Return the SHA-256 of tensors, of the facts about them, and of lines of metrics."""
    found = hashlib.sha256(json.dumps([sorted(facts.items()), list(lines)]).encode())
    for name, value in sorted(tensors.items()):
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _owner(student: nn.Module, settings: DistilSettings) -> Any:
    """Return the module by whose names of parameters the state of the optimizer is stored."""
    return attached(student) if settings.trained == "methods" else student


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
