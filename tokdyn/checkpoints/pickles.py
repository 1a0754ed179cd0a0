"""Read torch's pickled files without running any code in them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from tokdyn.errors import CheckpointError


class Record:
    """A stand-in for a settings object in a training file: attributes without behaviour."""

    def lookup(self, *path: str) -> Any:
        """Return the attribute at a path such as ("model", "hnet", "num_heads"), or None."""
        value: Any = self
        for name in path:
            value = getattr(value, "__dict__", {}).get(name)
        return value


_SETTINGS = ("Config", "ModelConfig", "HNetConfig", "TrainingConfig", "DataConfig", "DiffusionConfig", "LoggingConfig")
STAND_INS: tuple[str, ...] = ("argparse.Namespace", *(f"config.{name}" for name in _SETTINGS))
"""The only classes allowed beyond torch's own: those in training files of DiT, SiT, DyDiT and DC-DiT."""


def load_pickled(path: Path) -> Any:
    """Load a .pt, .pth or .bin file with `weights_only=True` and the stand-ins.

    Args:
        path: an existing file.

    Returns:
        The saved object, usually a mapping. Settings objects arrive as `Record`.

    Raises:
        CheckpointError: the file is damaged, is not a torch file, or holds any other object, which is never built.
    """
    classes: list[Any] = [(Record, name) for name in STAND_INS]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile stream can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds the Python object {refused[1]} and was refused, since loading foreign objects can run "
                "code; save the weights alone, preferably as safetensors, and read that file."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint: it is truncated, damaged or of another kind ({reason})."
        ) from error
