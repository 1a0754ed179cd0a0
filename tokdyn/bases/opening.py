"""From what the user wrote to a model, and where it came from."""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.attach import CONFIG, load
from tokdyn.bases import hub
from tokdyn.bases.download import Unreachable, cache_folder, digest, fetch
from tokdyn.bases.table import TARGETS, Objective, Row, rows, shipped_folder
from tokdyn.checkpoints import Kind, read
from tokdyn.checkpoints.files import weight_files
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object
from tokdyn.models import DCDiT, DiT

_FACTS = "tokdyn.json"


@dataclass(frozen=True)
class Base:
    """A pretrained model.

    Attributes:
        model: in evaluation mode, fp32, on the CPU.
        objective: what it was trained to predict: noise, or the velocity of a flow.
        origin: what the user wrote.
        path: the file or folder that was read.
        sha256: of the file with the weights; of several, of the list of their digests and names.
        facts: what tokdyn.json beside the weights says; empty if there is none.
    """

    model: DiT | DCDiT
    objective: Objective
    origin: str
    path: Path
    sha256: str
    facts: dict[str, Any]


def open_base(name: str | Path, kind: Kind | None = None, ema: bool = True, **config: Any) -> DiT | DCDiT:
    """The model of a base; see `read_base`."""
    return read_base(name, kind, ema, **config).model


def read_base(name: str | Path, kind: Kind | None = None, ema: bool = True, **config: Any) -> Base:
    """Find a base, download it if need be, and read it.

    Args:
        name: a path; else a name of `tokdyn models`; else OWNER/REPO or OWNER/REPO:FILE_OR_FOLDER of the hub.
        kind: its format; None takes that of the table, or recognises it. SiT files have to be told.
        ema: take the averaged weights where there are both.
        **config: see `tokdyn.checkpoints.read`.

    Returns:
        The model and where it came from.

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
    for place in (files[0].parent, files[0].parent / "methods"):  # as `save` and a training run write them
        if (place / CONFIG).is_file():
            load(model, place)
    facts = _facts(files[0].parent)
    return Base(model, _objective(model, row, facts, files[0].parent), str(name), path, _sha256(files), facts)


def check_name(name: str) -> None:
    """Refuse what can be no base, before anything else is looked at.

    Raises:
        CheckpointError: it is no path that exists, no name of the table and no id of the hub.
    """
    if (name and Path(name).expanduser().exists()) or name in rows():
        return
    if not hub.ID.fullmatch(name) or name.startswith(("./", "../", "~/")):
        raise CheckpointError(f"there is no base {name!r}: it is no path that exists{_meant(name)}; {_WHAT}.")


def locate(name: str, local: bool = False) -> tuple[Path, Row | None]:
    """Where a base lies, after it was downloaded if need be, and its row of the table.

    Args:
        name: see `read_base`.
        local: download nothing.

    Raises:
        CheckpointError: see `read_base`.
    """
    path = Path(name).expanduser()
    if name and path.exists():
        return path, None
    check_name(name)
    row = rows().get(name)
    place = name if row is None else row.place
    try:
        if row is not None and row.source == "shipped":
            return shipped_folder(row.place), row
        if row is not None and row.source == "url":
            return _public(row, local), row
        return hub.fetch(place, local), row
    except Unreachable as reason:
        shipped = [each.name for each in rows().values() if each.source == "shipped"]
        ways = f"use a base that ships with tokdyn ({', '.join(shipped) or 'this installation has none'})"
        raise CheckpointError(
            f"{name} cannot be downloaded ({reason}){_meant(name) if row is None else ''}: give --base PATH to a file "
            f"or folder that you have, bring a filled cache ({_cache(row)}) from a machine with a network, or {ways}."
        ) from reason


_WHAT = "give a path, a name of `tokdyn models`, or OWNER/REPO[:FILE_OR_FOLDER] of the hub"


def in_cache(row: Row) -> bool:
    """Whether a base can be opened without a network."""
    try:
        locate(row.name, local=True)
    except CheckpointError:
        return False
    return True


def _public(row: Row, local: bool) -> Path:
    file = cache_folder() / row.file
    if local:
        if not file.is_file():
            raise Unreachable("only the cache was asked")
        return file
    fetch(row.place, file, row.sha256)
    return file


def _cache(row: Row | None) -> str:
    """The place to fill."""
    if row is not None and row.source == "url":
        return str(cache_folder() / row.file)
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


def _meant(name: str) -> str:
    near = difflib.get_close_matches(name, rows(), n=1, cutoff=0.75)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _objective(model: DiT | DCDiT, row: Row | None, facts: dict[str, Any], folder: Path) -> Objective:
    """What is written beside the weights; else what the table says; else what follows from the model's clock."""
    stated = facts.get("objective")
    if stated is not None:
        kind = stated.get("kind", "noise") if isinstance(stated, dict) else stated
        if kind not in ("noise", "flow"):
            raise CheckpointError(f"{folder / _FACTS} has an objective {kind!r}; expected noise or flow.")
        return "flow" if kind == "flow" else "noise"
    if row is not None:
        return row.objective
    return "noise" if tuple(model.config.timestep_map) == (1.0, 0.0) else "flow"


def _facts(folder: Path) -> dict[str, Any]:
    return json_object(folder / _FACTS) if (folder / _FACTS).is_file() else {}


def _sha256(files: list[Path]) -> str:
    found = [
        hub.checked(file) if re.fullmatch(r"[0-9a-f]{40,64}", file.resolve().name) else digest(file) for file in files
    ]
    if len(found) == 1:
        return found[0]
    lines = "".join(f"{each}  {file.name}\n" for each, file in zip(found, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
