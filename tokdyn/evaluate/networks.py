"""Open the extractor that the settings name: Inception, a timm model or a TorchScript file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from tokdyn.errors import CheckpointError
from tokdyn.evaluate.config import INCEPTION, TIMM_PREFIX, EvalConfig
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo, file_sha256
from tokdyn.evaluate.inception import open_inception
from tokdyn.files import user_path
from tokdyn.host import open_device


def open_extractor(config: EvalConfig) -> Extractor:
    """Load the network of `config.extractor` onto `config.device`.

    Raises:
        CheckpointError: The network or its weights are not available.
        InputError: There is no such device.
    """
    device = open_device(config.device)
    if config.extractor == INCEPTION:
        return open_inception(config.weights, config.input_size, device)
    if config.extractor.startswith(TIMM_PREFIX):
        from tokdyn.evaluate.timm_model import open_timm  # timm takes seconds to import

        return open_timm(config.extractor.removeprefix(TIMM_PREFIX), config.checkpoint, config.input_size, device)
    return open_torchscript(user_path(config.extractor), config.input_size, device)


def open_torchscript(path: Path, input_size: int | None, device: torch.device) -> Extractor:
    """Load a TorchScript network, which is named after its file.

    A TorchScript file is a program: load only files you trust.

    Args:
        path: File with a network that takes uint8 (B, 3, H, W) and returns what `Extractor.forward` has to return.
        input_size: Side in pixels that images are resized to before they are given to the network; None does not.
        device: Device of the network.

    Raises:
        CheckpointError: There is no such file, or it is not TorchScript.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no extractor {path}: set extractor to 'inception', 'timm:NAME' or the path of a TorchScript "
            "file."
        )
    try:
        with warnings.catch_warnings():  # torch announces the end of TorchScript; files in circulation still need it
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.load", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.load", category=DeprecationWarning)
            network = torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a TorchScript file: save the network with torch.jit.script or torch.jit.trace."
        ) from error
    network.eval()
    info = ExtractorInfo(kind="torchscript", name=path.stem, sha256=file_sha256(path), input_size=input_size)
    return Extractor(info, network, device)
