"""Read torch's pickled files without running code from them.

Training files of other projects hold settings objects of their own classes. These are read as `Record`, which has the
attributes and none of the code.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from tokdyn.errors import CheckpointError
from tokdyn.limits import UNPACKED
from tokdyn.reading import RefusedFileError, one_line, open_archive, require_size

_SMALL = 2**24  # bytes that any file may take in memory


class Record:
    """The attributes of a settings object in a training file."""


def lookup(record: Record, *path: str) -> Any:
    """Return the nested attribute at a path such as ("model", "hnet", "num_heads"), or None if there is none.

    It is no method, because a file may give a record attributes of any name.
    """
    value: Any = record
    for name in path:
        value = getattr(value, "__dict__", {}).get(name)
    return value


_SETTINGS = ("Config", "ModelConfig", "HNetConfig", "TrainingConfig", "DataConfig", "DiffusionConfig", "LoggingConfig")
READ_AS_RECORD: tuple[str, ...] = ("argparse.Namespace", *(f"config.{name}" for name in _SETTINGS))
"""Classes of settings objects in training files of DiT, SiT, DyDiT and DC-DiT. Any other class is refused."""


def load_pickled(path: Path, records: bool = True) -> Any:
    """Load a .pt, .pth, .bin or .ckpt file with `weights_only=True`.

    Args:
        path: an existing file.
        records: read settings objects; otherwise they are refused as any other object is.

    Returns:
        The saved object, usually a mapping. Settings objects of the classes in `READ_AS_RECORD` are a `Record`.

    Raises:
        CheckpointError: the file is damaged, is not a torch file, or holds an object of any other class; such objects
            are not created.
    """
    classes: list[Any] = [(Record, name) for name in READ_AS_RECORD] if records else []
    try:
        packed = zipfile.is_zipfile(path)
        if packed:
            with open_archive(path) as archive:
                require_honest(path, sum(entry.file_size for entry in archive.filelist))
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except RefusedFileError as error:
        raise CheckpointError(f"{path} is not read: {error}.") from error
    except Exception as error:  # a damaged or hostile stream can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds a Python object of class {one_line(refused[1], 80)} and was refused, because "
                "loading it could "
                "run code; save the weights alone, preferably as safetensors, and read that file."
            ) from error
        # the words of torch are left out: they advise to load the file without protection
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of torch: it is truncated, damaged or another kind of file, "
            "such as a "
            "pickle of another program; copy it again, or save the weights alone, preferably as safetensors."
        ) from error


def require_honest(path: Path, size: int) -> None:
    """Refuse a file whose content takes many times its size, as compressed or repeated elements do.

    Args:
        path: the file.
        size: bytes of the content.

    Raises:
        RefusedFileError: the content is too large for the file.
    """
    if size > _SMALL:
        require_size(path, size // max(1, path.stat().st_size), UNPACKED)
