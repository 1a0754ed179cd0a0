"""Reading torch's pickled files without running anything that they contain."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from tokdyn.errors import CheckpointError


class Record:
    """A harmless stand-in for a settings object in a training file: attributes, no behaviour."""

    def lookup(self, *path: str) -> Any:
        """The attribute at a path such as ("model", "hnet", "num_heads"), or None."""
        value: Any = self
        for name in path:
            value = getattr(value, "__dict__", {}).get(name)
        return value


_SETTINGS = ("Config", "ModelConfig", "HNetConfig", "TrainingConfig", "DataConfig", "DiffusionConfig", "LoggingConfig")
STAND_INS: tuple[str, ...] = ("argparse.Namespace", *(f"config.{name}" for name in _SETTINGS))
"""The only classes beyond torch's own that may occur: what DiT, SiT, DyDiT and DC-DiT training files hold."""


def load_pickled(path: Path) -> Any:
    """Load a .pt, .pth or .bin file with `weights_only=True` and the stand-ins above.

    Args:
        path: an existing file.

    Returns:
        What was saved: usually a mapping. Settings objects arrive as `Record`.

    Raises:
        CheckpointError: the file is damaged, is no torch file, or holds any other object, which is never built.
    """
    classes: list[Any] = [(Record, name) for name in STAND_INS]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile stream can raise anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise CheckpointError(
                f"{path} was refused: it holds the Python object {found[1]}, and loading foreign objects can run code. "
                "Save the weights alone, best as safetensors, and read that file."
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read as a torch checkpoint: it is truncated, damaged or another kind of file ({reason})."
        ) from error
