"""Files that are there whole or not at all, folders that are checked before long work begins, JSON objects."""

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
"""A path in a settings model; `~` is the home folder, also where the shell leaves it alone."""


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place if the block ends well and is removed if it does not.

    Makes the folder if need be.

    Raises:
        OutputError: the system refuses, for example because the disk is full.
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
    """Where `path` is written before it is complete; hidden, so that nobody takes it for a result."""
    return path.with_name(f".{path.name}.half")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about writing `path` into one sentence.

    Raises:
        OutputError: the system refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written ({reason}): make room, or choose another place.") from error


def require_folder(folder: Path, setting: str = "out") -> None:
    """Refuses a folder that files cannot be written to, before long work begins; makes nothing.

    Args:
        folder: that will be written to; it need not exist.
        setting: what the user calls it.

    Raises:
        OutputError: it is a file, lies below one, or must not be written to.
    """
    with writing(folder):
        place = folder.absolute()
        while not place.exists():
            place = place.parent
    if not place.is_dir():
        raise OutputError(
            f"{setting}={folder} cannot be a folder, because {place} is a file: choose another {setting}."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{setting}={folder} must not be written to ({place}): choose another {setting}.")
