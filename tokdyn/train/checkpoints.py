"""Write the checkpoints of a training run, and find the newest undamaged one.

Each is a folder `step_0001000` below `checkpoints`, with a state.json that lists the size and hash of its files and
ends with a hash of its own contents. It is written under another name and renamed, so that an interruption leaves a
complete checkpoint or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tokdyn.errors import CheckpointError

_NAME = re.compile(r"^step_(\d+)$")
_HALF = ".half_"  # prefix of files and folders that are being written or removed
_STATE, _DIGEST = "state.json", "digest"
_READ = (".json", ".jsonl", ".safetensors")  # endings of the files that are read from a checkpoint
FORMAT = 2
_UNSEALED = 1  # the format before state.json had a hash of its own contents


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
    """Replace the text of a file atomically: a reader sees the old or the new text, never a part of it.

    Raises:
        CheckpointError: The system refused to write; an older file is untouched.
    """
    half = _half_of(path)
    try:
        with half.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            half.unlink()
        raise refused(path, error) from error


def refused(path: Path, error: Exception) -> CheckpointError:
    """Return the error of a file that the system refused to write."""
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path} could not be written ({reason}); free some space, then continue with --resume.")


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it appears complete or not at all. It replaces an older folder of the same name.

    Args:
        target: Path of the folder.
        write: Called with the path of a temporary folder, into which it writes the contents.

    Raises:
        CheckpointError: The system refused to write. The temporary folder is removed, and an older folder is untouched.
    """
    half = _half_of(target)
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
    except CheckpointError:
        shutil.rmtree(half, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as error:
        shutil.rmtree(half, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target} could not be written ({reason}); earlier checkpoints are untouched. Free some space, then "
            "continue with --resume."
        ) from error


def write_part(root: Path, step: int, write: Callable[[Path], None]) -> None:
    """Write the part of this process into the checkpoint that the main process is writing with `save`.

    Args:
        root: The `checkpoints` folder.
        step: Optimizer steps taken.
        write: Called with the path of the folder, which exists when the main process has called its own `write`.

    Raises:
        CheckpointError: The system refused to write.
    """
    target = folder_of(root, step)
    try:
        write(_half_of(target))
    except (OSError, SafetensorError) as error:
        raise refused(target, error) from error


def _half_of(target: Path) -> Path:
    """Return the path of the file or folder that is written until `target` is complete."""
    return target.with_name(f"{_HALF}{target.name}")


def _remove(folder: Path) -> None:
    """Remove a folder after renaming it, so that it is never seen in part."""
    aside = folder.with_name(f"{_HALF}old_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def clear(folder: Path) -> None:
    """Remove what was half written or half removed in a run's folder when an earlier process was killed."""
    for place in (folder, folder / "checkpoints"):
        for half in place.glob(f"{_HALF}*"):
            if half.is_dir() and not half.is_symlink():
                shutil.rmtree(half, ignore_errors=True)
            else:
                half.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(contents: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a state.json with the SHA-256 of all of them under "digest"."""
    rest = {key: value for key, value in contents.items() if key != _DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, _DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def save(root: Path, step: int, write: Callable[[Path], None], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, write its name to the file `latest`, and remove the oldest checkpoints.

    Args:
        root: The `checkpoints` folder.
        step: Optimizer steps taken.
        write: Called with the path of a folder, into which it writes the weights and the optimizer state.
        state: JSON data for state.json; the sizes and hashes of all files are added.
        keep: Checkpoints to keep, including this one; damaged ones of later steps do not count.

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
        contents = sealed({"format": FORMAT, "step": step, **state, "files": files})
        (folder / _STATE).write_text(json.dumps(contents, indent=1), encoding="utf-8")

    target = folder_of(root, step)
    write_folder(target, write_all)
    write_text(root / "latest", f"{target.name}\n")
    older = [old for old in steps_of(root) if old < step]
    try:
        for old in older[: max(0, len(older) + 1 - keep)]:
            _remove(folder_of(root, old))
    except OSError as error:
        raise CheckpointError(
            f"{target} is saved, but older checkpoints in {root} could not be removed ({error}); remove them by hand."
        ) from error
    return target


def verify(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint, and compare every file, state.json included, with the hash of it.

    Returns:
        The contents of state.json.

    Raises:
        CheckpointError: A file is missing, truncated, changed or not listed; the message names it.
    """
    state, files = _state(folder)
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise _damaged(folder, f"{name} is missing")
        if file.stat().st_size != size:
            raise _damaged(folder, f"{name} has {file.stat().st_size} bytes of {size}")
        if _digest(file) != digest:
            raise _damaged(folder, f"{name} has changed since it was written")
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix in _READ and name != _STATE and name not in files:
            raise _damaged(folder, f"its {_STATE} does not list {name}")
    return state


def _state(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str]]]:
    """Read and check state.json; return its contents, and the size and SHA-256 of each file by name."""
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        version, step, seal = state["format"], state["step"], state.get(_DIGEST)
        files = {str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in state["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: its {_STATE} cannot be read.") from error
    if version != _UNSEALED if seal is None else sealed(state)[_DIGEST] != seal:
        raise _damaged(folder, f"{_STATE} has changed since it was written")
    if version not in (_UNSEALED, FORMAT):
        raise CheckpointError(
            f"{folder} has checkpoint format {version}, and this version of tokdyn reads {FORMAT}; use the version "
            "that wrote it."
        )
    named = _NAME.match(folder.name)
    if type(step) is not int or (named and int(named[1]) != step):
        raise _damaged(folder, f"its {_STATE} is that of step {step}")
    return state, files


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {folder} is damaged: {what}.")


def newest(root: Path, check: Callable[[Path, dict[str, Any]], None] | None = None) -> Checkpoint | None:
    """Find the newest undamaged checkpoint.

    Args:
        root: The `checkpoints` folder.
        check: Called with the folder and the contents of state.json; raises a CheckpointError if these are incomplete.

    Returns:
        The checkpoint, or None if the folder does not exist or has no checkpoints.

    Raises:
        CheckpointError: There are checkpoints, and all of them are damaged.
    """
    skipped: list[str] = []
    for step in reversed(steps_of(root)):
        folder = folder_of(root, step)
        try:
            state = verify(folder)
            if check is not None:
                check(folder, state)
            return Checkpoint(folder, step, state, tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(
            f"No checkpoint in {root} can be used. {' '.join(skipped)} Start a new run in another folder."
        )
    return None
