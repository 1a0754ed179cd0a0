"""Turn what libraries raise when another process has ended into one sentence."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from tokdyn.data.loading import worker_ended
from tokdyn.errors import TokdynError
from tokdyn.train import checkpoints


def explained(error: RuntimeError, accelerator: Accelerator | None, folder: Path) -> TokdynError | None:
    """Return a sentence for the end of a process that loads data or trains along; None for other errors.

    Args:
        error: What was raised.
        accelerator: Knows the other processes; None if they are not connected yet.
        folder: The run's folder.
    """
    if told := worker_ended(error):
        return told
    several = accelerator is not None and accelerator.num_processes > 1
    if several and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
        last = checkpoints.steps_of(folder / "checkpoints")
        kept = f"the checkpoint of step {last[-1]} is kept" if last else "there is no checkpoint yet"
        return TokdynError(
            f"Another process of this training ended or does not answer; {kept}. Its own last line says why. Start all "
            "of them again with --resume."
        )
    return None
