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


class Record:
    """The attributes of a settings object in a training file."""

    def lookup(self, *path: str) -> Any:
        """Return the nested attribute at a path such as ("model", "hnet", "num_heads"), or None if there is none."""
        value: Any = self
        for name in path:
            value = getattr(value, "__dict__", {}).get(name)
        return value


_SETTINGS = ("Config", "ModelConfig", "HNetConfig", "TrainingConfig", "DataConfig", "DiffusionConfig", "LoggingConfig")
READ_AS_RECORD: tuple[str, ...] = ("argparse.Namespace", *(f"config.{name}" for name in _SETTINGS))
"""Classes of settings objects in training files of DiT, SiT, DyDiT and DC-DiT. Any other class is refused."""


def load_pickled(path: Path) -> Any:
    """Load a .pt, .pth, .bin or .ckpt file with `weights_only=True`.

    Args:
        path: an existing file.

    Returns:
        The saved object, usually a mapping. Settings objects of the classes in `READ_AS_RECORD` are a `Record`.

    Raises:
        CheckpointError: the file is damaged, is not a torch file, or holds an object of any other class; such objects
            are not created.
    """
    classes: list[Any] = [(Record, name) for name in READ_AS_RECORD]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile stream can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds a Python object of class {refused[1]} and was refused, because loading it could run "
                "code; save the weights alone, preferably as safetensors, and read that file."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint: it is truncated, damaged or another kind of file ({reason})."
        ) from error
