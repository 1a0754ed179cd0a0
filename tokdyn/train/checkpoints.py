"""Write the checkpoints of a training run, and find the newest undamaged one.

Each is a folder `step_0001000` below `checkpoints`, with a state.json that lists the size and hash of its files. It is
written under another name and renamed, so that an interruption leaves a complete checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tokdyn.errors import CheckpointError

_NAME = re.compile(r"^step_(\d+)$")
_HALF = ".half_"  # prefix of files and folders that are being written or removed
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        folder: The checkpoint's folder.
        step: Optimizer steps taken before it was written.
        state: The contents of state.json.
        skipped: One sentence about each newer checkpoint, all of which are damaged.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


def folder_of(root: Path, step: int) -> Path:
    """Return the path of a step's checkpoint; `root` is the `checkpoints` folder of the run."""
    return root / f"step_{step:07d}"


def steps_of(root: Path) -> list[int]:
    """List in ascending order the steps that have a folder in `root`, damaged ones included."""
    if not root.is_dir():
        return []
    return sorted(int(match.group(1)) for entry in root.iterdir() if (match := _NAME.match(entry.name)))


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the text of a file atomically: a reader sees the old or the new text, never a part of it."""
    half = path.with_name(f"{_HALF}{path.name}")
    with half.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
    _sync(path.parent)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it appears complete or not at all. It replaces an older folder of the same name.

    Args:
        target: Path of the folder.
        write: Called with the path of a temporary folder, into which it writes the contents.

    Raises:
        CheckpointError: The system refused to write. The temporary folder is removed, and an older folder is untouched.
    """
    half = target.with_name(f"{_HALF}{target.name}")
    try:
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        write(half)
        for path in (*half.rglob("*"), half):
            _sync(path)
        if target.exists():
            _remove(target)
        half.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(half, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target} could not be written ({reason}); earlier checkpoints are untouched. Free some space, then "
            "continue with --resume."
        ) from error


def _remove(folder: Path) -> None:
    """Remove a folder after renaming it, so that it is never seen in part."""
    aside = folder.with_name(f"{_HALF}old_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(root: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, write its name to the file `latest`, and remove the oldest checkpoints.

    Args:
        root: The `checkpoints` folder.
        step: Optimizer steps taken.
        write: Called with the path of a folder, into which it writes the weights and the optimizer state.
        state: JSON data for state.json; the sizes and hashes of all files are added.
        keep: Checkpoints to keep, including this one.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The checkpoint could not be written, or an old one not removed.
    """

    def write_all(folder: Path) -> None:
        write(folder)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        contents = {"format": FORMAT, "step": step, **state, "files": files}
        (folder / "state.json").write_text(json.dumps(contents, indent=1), encoding="utf-8")

    target = folder_of(root, step)
    write_folder(target, write_all)
    try:
        write_text(root / "latest", f"{target.name}\n")
        for old in steps_of(root)[:-keep]:
            if old < step:
                _remove(folder_of(root, old))
    except OSError as error:
        raise CheckpointError(
            f"{target} is saved, but older checkpoints in {root} could not be removed ({error}); remove them by hand."
        ) from error
    return target


def verify(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint, and compare every file with the size and hash listed there.

    Returns:
        The contents of state.json, with "step" as an int.

    Raises:
        CheckpointError: A file is missing, truncated or changed; the message names it.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = state["files"]
        step = int(state["step"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: its state.json cannot be read.") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {state.get('format')}, and this version of tokdyn reads {FORMAT}; use the "
            "version that wrote it."
        )
    for name, (size, digest) in expected.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"The checkpoint {folder} is damaged: {name} has {file.stat().st_size} bytes of {size}."
            )
        if _digest(file) != digest:
            raise CheckpointError(f"The checkpoint {folder} is damaged: {name} has changed since it was written.")
    return {**state, "step": step}


def newest(root: Path) -> Checkpoint | None:
    """Find the newest undamaged checkpoint.

    Args:
        root: The `checkpoints` folder.

    Returns:
        The checkpoint, or None if the folder does not exist or has no checkpoints.

    Raises:
        CheckpointError: There are checkpoints, and all of them are damaged.
    """
    skipped: list[str] = []
    for step in reversed(steps_of(root)):
        folder = folder_of(root, step)
        try:
            return Checkpoint(folder, step, verify(folder), tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(
            f"No checkpoint in {root} can be used. {' '.join(skipped)} Start a new run in another folder."
        )
    return None
