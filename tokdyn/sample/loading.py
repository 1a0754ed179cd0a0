"""Load a model for sampling, with its objective and what is known of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokdyn.attach import load
from tokdyn.bases import read_base
from tokdyn.checkpoints import read
from tokdyn.data.config import DataConfig
from tokdyn.data.shards import LatentOrigin
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object, user_path
from tokdyn.models import DCDiT, DiT
from tokdyn.train.checkpoints import newest
from tokdyn.train.snapshot import METHODS

_FACTS = "tokdyn.json"
_PARTS = frozenset({"model", "ema", "checkpoints", "transformer"})  # names of folders inside a run or a pipeline


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from and what is known of its training.

    Attributes:
        path: folder or file that was read.
        name: name of the training run, or of the folder or file.
        step: optimizer steps taken before a checkpoint was written; None if the model is not from a checkpoint.
        data: settings of the data that the model was trained on; None if not known.
        latents: which autoencoder made the latents that the model was trained on, and how; None for pixels, and if not
            known.
        class_names: names of the classes in the order of their labels; empty if not known.
    """

    path: Path
    name: str
    step: int | None
    data: DataConfig | None
    latents: LatentOrigin | None
    class_names: tuple[str, ...]


def load_model(path: str | Path, ema: bool = True) -> tuple[DiT | DCDiT, Objective, ModelInfo]:
    """Load a model for sampling.

    Args:
        path: a training folder (of which the finished model is read, or if there is none the newest checkpoint), a
            checkpoint folder, a folder of `save_pretrained`, or any file that `tokdyn.checkpoints.read` reads. Where
            there is none, a name that `tokdyn models` lists as pretrained, or an id of the hub.
        ema: take the averaged weights of a checkpoint, not those of the last step. With False, the finished model of a
            training folder is skipped, because it holds averaged weights.

    Returns:
        The model, in evaluation mode on the CPU, with the methods of its training attached; its objective; and where it
        came from. If there is no tokdyn.json beside the weights, the objective is that of the original DiT (noise
        prediction, 1000 steps), or flow matching if the model maps its timesteps as SiT does.

    Raises:
        CheckpointError: there is no model at the path, or it is damaged.
    """
    start = user_path(path)
    if start.exists():
        place, step = _locate(start, ema)
        model, title = read(place, ema=ema), _name(start)
    else:
        base = read_base(str(path), ema=ema)
        place, step, model, title = base.path, None, base.model, base.origin
    if start.exists() and (place / METHODS).is_dir():
        load(model, place / METHODS)
    facts = _facts(place)
    try:
        objective = Objective(**facts.get("objective", _default_objective(model)))
        data = DataConfig(**facts["data"]) if facts.get("data") else None
        latents = LatentOrigin(**facts["latents"]) if facts.get("latents") else None
    except (ValidationError, TypeError) as error:
        raise CheckpointError(
            f"{place / _FACTS} does not describe an objective and data that this version of tokdyn reads: save the "
            "model again."
        ) from error
    name, names = str(facts.get("name") or title), facts.get("class_names") or ()
    if not isinstance(names, list | tuple) or len(names) > model.config.num_classes:
        raise CheckpointError(
            f"{place / _FACTS} does not list the {model.config.num_classes} classes of the model: save the model again."
        )
    info = ModelInfo(place, name, step, data, latents, tuple(map(str, names)))
    return model, objective, info


def _default_objective(model: DiT | DCDiT) -> dict[str, Any]:
    """Return the objective of a model that was saved without one: flow matching if its timesteps are mapped."""
    if tuple(model.config.timestep_map) != (1.0, 0.0):
        return {"kind": "flow"}
    return {"learn_sigma": model.config.learn_sigma}


def _name(path: Path) -> str:
    """Return a name for a model without a tokdyn.json: that of its file, or of the run's folder."""
    if path.is_file():
        return path.stem
    parts = reversed(path.absolute().parts)
    return next(part for part in parts if part not in _PARTS and not part.startswith("step_"))


def _locate(path: Path, ema: bool) -> tuple[Path, int | None]:
    """Return the folder or file that holds the weights, and the step if it is in a checkpoint."""
    which = "ema" if ema else "model"
    if not path.is_dir() or (path / "config.json").is_file():
        return path, None
    if (path / "state.json").is_file():
        step = path.name.removeprefix("step_")
        return path / which, int(step) if step.isdecimal() else None
    if ema and (path / "model" / "config.json").is_file():
        return path / "model", None
    for root in (path / "checkpoints", path):
        checkpoint = newest(root)
        if checkpoint is not None:
            return checkpoint.folder / which, checkpoint.step
    if (path / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path} is a training folder without a {'finished model or a ' if ema else ''}checkpoint: resume training."
        )
    return path, None


def _facts(place: Path) -> dict[str, Any]:
    """Read the tokdyn.json beside the weights; {} if there is none."""
    file = (place if place.is_dir() else place.parent) / _FACTS
    return json_object(file) if file.is_file() else {}
