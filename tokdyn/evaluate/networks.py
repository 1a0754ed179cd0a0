"""Opens the extractor that the settings name."""

from __future__ import annotations

from pathlib import Path

from tokdyn.evaluate.config import INCEPTION, TIMM_PREFIX, EvalConfig
from tokdyn.evaluate.extractor import Extractor
from tokdyn.evaluate.inception import open_inception
from tokdyn.evaluate.torchscript import open_torchscript
from tokdyn.host import open_device


def open_extractor(config: EvalConfig) -> Extractor:
    """Loads the network of `config.extractor` onto `config.device`.

    Raises:
        CheckpointError: It or its weights cannot be had.
        InputError: There is no such device here.
    """
    device = open_device(config.device)
    if config.extractor == INCEPTION:
        return open_inception(config.weights, config.input_size, device)
    if config.extractor.startswith(TIMM_PREFIX):
        from tokdyn.evaluate.timm_model import open_timm  # timm takes seconds to import

        return open_timm(config.extractor.removeprefix(TIMM_PREFIX), config.checkpoint, config.input_size, device)
    return open_torchscript(Path(config.extractor).expanduser(), config.input_size, device)
