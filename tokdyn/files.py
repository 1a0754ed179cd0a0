"""Atomic writing of files, checks of output folders before long work begins, and JSON objects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from safetensors import SafetensorError

from tokdyn.errors import CheckpointError, OutputError

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
"""A path in a settings model; `~` becomes the home folder even where the shell does not expand it."""


def json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is not readable JSON ({error}): restore it, or use another checkpoint."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a JSON object: restore it, or use another checkpoint."
        )
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: the path yielded replaces `path` if the block succeeds, and is removed if it does not.

    The folder is created if needed.

    Raises:
        OutputError: the file cannot be written, for example because the disk is full.
    """
    half = half_of(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield half
            half.replace(path)
    finally:
        with suppress(OSError):
            half.unlink()


def half_of(path: Path) -> Path:
    """Return where `path` is written until it is complete: a hidden file, so that nobody takes it for a result."""
    return path.with_name(f".{path.name}.half")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the operating system about writing `path` into an OutputError.

    Raises:
        OutputError: the system refuses to write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written ({reason}): make room, or choose another place.") from error


def require_folder(folder: Path, setting: str = "out") -> None:
    """Refuse a folder that cannot be written to, before long work begins; create nothing.

    Args:
        folder: folder that will be written to; it need not exist.
        setting: name of the setting that holds it.

    Raises:
        OutputError: it is a file or lies below one, or there is no permission to write to it.
    """
    with writing(folder):
        nearest = folder.absolute()
        while not nearest.exists():
            nearest = nearest.parent
    if not nearest.is_dir():
        raise OutputError(
            f"{setting}={folder} cannot be a folder, because {nearest} is a file: choose another {setting}."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{setting}={folder} is not writable ({nearest}): choose another {setting}.")
