"""Open the Inception network that FID, IS and KID are defined on, as torch-fidelity implements it."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from tokdyn.checkpoints.pickles import load_pickled
from tokdyn.errors import CheckpointError
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo, file_sha256

# The weights that published numbers were measured with.
PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FEATURES = "2048"  # torch-fidelity's name of the pooled layer, (B, 2048)
LOGITS = "logits_unbiased"  # torch-fidelity's name of the logits that IS is defined on, (B, 1008)


def cached_weights() -> Path:
    """Return the path that the weights are downloaded to; the file may not exist yet."""
    return Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(URL_INCEPTION_V3).name)


def open_inception(weights: Path | None, input_size: int | None, device: torch.device) -> Extractor:
    """Open the network of FID, which itself resizes images of any size to 299 x 299 (bilinear, as in TensorFlow 1).

    Args:
        weights: File with the weights; None takes the published ones, and downloads them if necessary. With other
            weights the metrics are not called FID, IS and KID.
        input_size: Side in pixels that images are resized to before they are given to the network; None does not.
        device: Device of the network.

    Raises:
        CheckpointError: The weights are missing and cannot be downloaded, or are not weights of this network.
    """
    path = _download() if weights is None else weights
    if not path.is_file():
        raise CheckpointError(
            f"There are no Inception weights at {path}: correct weights=, or remove it to use the published ones."
        )
    sha256 = file_sha256(path)
    if sha256 != PUBLISHED_SHA256:
        _check_plain_tensors(path)
    try:
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", [FEATURES, LOGITS], feature_extractor_weights_path=str(path)
        ).to(device)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold the weights of torch-fidelity's Inception network: correct weights=, or remove it "
            "to use the published ones."
        ) from error
    standard = sha256 == PUBLISHED_SHA256
    info = ExtractorInfo(
        kind="inception",
        name="inception" if standard else path.stem,
        sha256=sha256,
        input_size=input_size,
        standard=standard,
    )
    return Extractor(info, network, device)


def _download() -> Path:
    """Return the path of the published weights, after downloading them if necessary."""
    path = cached_weights()
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(path), hash_prefix=PUBLISHED_SHA256, progress=sys.stderr.isatty()
            )
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"The Inception weights cannot be downloaded ({error}): put {URL_INCEPTION_V3} at {path}, or give a "
                "local copy with weights=FILE, or use another network with extractor=FILE.ts or extractor=timm:NAME."
            ) from error
    return path


def _check_plain_tensors(path: Path) -> None:
    """Raise a CheckpointError if a file holds more than tensors, because torch-fidelity unpickles it."""
    try:
        load_pickled(path, records=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is not a file of tensors alone, which is required because other pickles can run code: save the "
            "state dict with torch.save."
        ) from error
