"""Open a pretrained model by path, name or hub id, and record where it came from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.attach import CONFIG, load
from tokdyn.bases.download import digest
from tokdyn.bases.hub import checked_digest
from tokdyn.bases.locating import locate
from tokdyn.bases.table import TARGETS, Objective, Row
from tokdyn.checkpoints import Kind, read
from tokdyn.checkpoints.files import weight_files
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object
from tokdyn.models import DCDiT, DiT

_FACTS = "tokdyn.json"


@dataclass(frozen=True)
class Base:
    """A pretrained model and its origin.

    Attributes:
        model: the model, in evaluation mode, in fp32, on the CPU.
        objective: what the model was trained to predict: "noise", or the velocity of a "flow".
        origin: the name or path that the user gave.
        path: the file or folder that was read.
        sha256: digest of the file with the weights; for several files, digest of the list of their digests and names.
        facts: contents of the tokdyn.json beside the weights; empty if there is none.
    """

    model: DiT | DCDiT
    objective: Objective
    origin: str
    path: Path
    sha256: str
    facts: dict[str, Any]


def open_base(name: str | Path, kind: Kind | None = None, ema: bool = True, **config: Any) -> DiT | DCDiT:
    """Find a pretrained model, download it if necessary, and return it; arguments and errors as for `read_base`."""
    return read_base(name, kind, ema, **config).model


def read_base(name: str | Path, kind: Kind | None = None, ema: bool = True, **config: Any) -> Base:
    """Find a base, download it if necessary, and read it.

    Args:
        name: a path, a name that `tokdyn models` lists, or a hub id OWNER/REPO or OWNER/REPO:FILE_OR_FOLDER. An
            existing path takes precedence, then a listed name.
        kind: the format; None takes that of a listed base, and otherwise recognises it. SiT files need "sit", those
            of REPA "repa".
        ema: take the averaged weights if a checkpoint holds averaged and plain ones.
        **config: settings that the weights do not determine, see `tokdyn.checkpoints.read`.

    Returns:
        The model, with the methods stored beside it attached, and its origin.

    Raises:
        CheckpointError: there is no such base, it is not in the cache and cannot be downloaded, or it cannot be read.
    """
    path, row = locate(str(name))
    if row is not None:
        kind = kind or row.kind
        if row.name in TARGETS:
            config = {"target": TARGETS[row.name], **config}
    model = read(path, None if kind == "tokdyn" else kind, ema=ema, **config)
    files = weight_files(path, ema)
    for place in (files[0].parent, files[0].parent / "methods"):  # of `tokdyn.save`, and of a training run
        if (place / CONFIG).is_file():
            load(model, place)
    facts = _facts(files[0].parent)
    return Base(model, _objective(model, row, facts, files[0].parent), str(name), path, _sha256(files), facts)


def _objective(model: DiT | DCDiT, row: Row | None, facts: dict[str, Any], folder: Path) -> Objective:
    """Return the objective that is stored beside the weights; if there is none, that of the row in the table.

    If there is no row either, a model that maps its timesteps is a flow, and any other predicts noise.
    """
    stated = facts.get("objective")
    if stated is not None:
        kind = stated.get("kind", "noise") if isinstance(stated, dict) else stated
        if kind not in ("noise", "flow"):
            raise CheckpointError(f"{folder / _FACTS} has the objective {kind!r}; expected noise or flow.")
        return "flow" if kind == "flow" else "noise"
    if row is not None:
        return row.objective
    return "noise" if tuple(model.config.timestep_map) == (1.0, 0.0) else "flow"


def _facts(folder: Path) -> dict[str, Any]:
    """Return the contents of the tokdyn.json in a folder; {} if there is none."""
    return json_object(folder / _FACTS) if (folder / _FACTS).is_file() else {}


def _sha256(files: list[Path]) -> str:
    """Return the digest of a file, or for several files that of the list of their digests and names."""
    digests = [
        checked_digest(file) if re.fullmatch(r"[0-9a-f]{40,64}", file.resolve().name) else digest(file)
        for file in files
    ]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{each}  {file.name}\n" for each, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
