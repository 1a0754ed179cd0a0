"""Write files atomically, check output folders before long work begins, read JSON objects, and find shipped files."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from safetensors import SafetensorError

from tokdyn.errors import CheckpointError, DataError, OutputError, RecipeError
from tokdyn.reading import one_line, read_json


def user_path(path: str | Path) -> Path:
    """Return a path with the home folder in place of a leading `~`; that of an unknown user stays, as in shells."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


UserPath = Annotated[Path, AfterValidator(user_path)]
"""The type of paths in settings. A leading `~` becomes the home folder, even if the shell has not expanded it."""


def shipped_recipes() -> Path:
    """Return the folder of the shipped recipes: that of tokdyn.recipes, or in a checkout the one beside the package.

    Raises:
        RecipeError: The folder is missing.
    """
    checkout = Path(__file__).resolve().parents[1] / "recipes"
    try:
        installed = Path(str(resources.files("tokdyn.recipes")))
    except ModuleNotFoundError:
        installed = checkout
    if not installed.is_dir():
        raise RecipeError(f"The shipped recipes are missing from {installed}; install tokdyn again.")
    return installed


def json_object(path: Path) -> dict[str, Any]:
    """Read a file of a checkpoint that holds one JSON object.

    Raises:
        CheckpointError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({one_line(error)}): restore it, or use another checkpoint."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a JSON object: restore it, or use another checkpoint."
        )
    return content


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically; a context manager.

    The block writes to a temporary file, which replaces `path` when the block ends and is removed if the block raises.
    The folder is created if it does not exist.

    Yields:
        The path of the temporary file, in the same folder.

    Raises:
        OutputError: the file cannot be written, for example because the disk is full.
    """
    temporary = half_of(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def half_of(path: Path) -> Path:
    """Return the path of the hidden file, in the same folder, that is written until `path` is complete."""
    return path.with_name(f".{path.name}.half")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of the operating system inside of the block as an OutputError that names `path`.

    Raises:
        OutputError: the operating system or safetensors could not write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written ({reason}): make room, or choose another place.") from error


def unused(folder: Path) -> Path:
    """Return the folder, or the first of NAME-2, NAME-3 and so on that does not exist."""
    names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in itertools.count(1))
    return next(path for path in names if not path.exists())


def require_path(path: Path) -> None:
    """Check that there is a file or folder to read, or a file such as a zip that the path leads into.

    Raises:
        DataError: there is neither.
    """
    if not path.exists() and not any(place.is_file() for place in path.parents):
        raise DataError(f"There is no file or folder {path}: give the path of one that exists.")


def require_folder(folder: Path, setting: str = "out") -> None:
    """Check that a folder can be written to, before long work begins. Nothing is left there.

    Args:
        folder: the folder, which need not exist.
        setting: name of the setting that it comes from, for the message.

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
    refused = OutputError(f"{setting}={folder} is not writable ({nearest}): choose another {setting}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise refused
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone do not tell, as in /proc
            pass
    except OSError as error:
        raise refused from error
