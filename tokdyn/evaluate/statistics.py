"""Statistics of a set of images as an extractor sees it, and the file that stores them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from tokdyn.errors import DataError
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.npz import npz_array
from tokdyn.files import replacing

FORMAT = 1


class Origin(BaseModel):
    """Where statistics come from.

    Attributes:
        format: Version of the file layout.
        extractor: Network that computed the features.
        images: Number of images.
        image_size: (rows, columns) of all of them, or None if they differed.
        source: Name of the folder or file of images.
        fingerprint: Hash of the listing of that source, and the choice made from it.
        published_moments: Whether the moments came with the images instead of being computed from them.
        values: Metrics of the reference by itself, such as its class accuracy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    extractor: ExtractorInfo
    images: int
    image_size: tuple[int, int] | None
    source: str
    fingerprint: str
    published_moments: bool = False
    values: dict[str, float] = {}


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and covariance (F, F), float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """Statistics of a set of images as an extractor sees it.

    Attributes:
        moments: Mean and covariance of the features.
        features: (N, F) float32, or None if a file holds the moments only.
        origin: Where they come from, or None if a file does not say.
    """

    moments: Moments
    features: Tensor | None = None
    origin: Origin | None = None


def moments_of(features: Tensor) -> Moments:
    """Compute the moments of features (N, F), N at least 2, in float64."""
    statistics = fid_features_to_statistics(features.double())
    return Moments(statistics["mu"], np.atleast_2d(statistics["sigma"]))


def save_statistics(path: Path, features: Tensor, moments: Moments, origin: Origin) -> None:
    """Write features (N, F), moments and origin atomically."""
    tensors = {
        "features": features.contiguous(),
        "mu": torch.from_numpy(moments.mean),
        "sigma": torch.from_numpy(np.ascontiguousarray(moments.covariance)),
    }
    with replacing(path) as half:
        save_file(tensors, half, metadata={"tokdyn": origin.model_dump_json()})


def load_statistics(path: Path) -> Statistics:
    """Read a file written by `save_statistics`.

    Raises:
        DataError: The file is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as cached statistics ({error}): delete it and make it again."
        ) from error
    try:
        origin = Origin.model_validate(json.loads(metadata["tokdyn"]))
        features, mean, covariance = (
            tensors["features"],
            tensors["mu"].double().numpy(),
            tensors["sigma"].double().numpy(),
        )
    except (KeyError, ValueError, ValidationError) as error:
        raise DataError(f"{path} holds no statistics of tokdyn eval: make one with cache=FILE.safetensors.") from error
    if origin.format != FORMAT:
        raise DataError(f"{path} has format {origin.format}, this version reads {FORMAT}: make it again with cache=.")
    width = features.shape[-1]
    if features.shape != (origin.images, width) or mean.shape != (width,) or covariance.shape != (width, width):
        raise DataError(f"{path} is damaged, its arrays do not fit together: delete it and make it again.")
    return Statistics(_finite(path, mean, covariance), features, origin)


def load_moments(path: Path) -> Statistics:
    """Read `mu` and `sigma` of an npz, as other programs publish them without saying which network made them.

    Raises:
        DataError: The arrays are not a mean and a covariance.
    """
    mean, covariance = (npz_array(path, key).astype(np.float64) for key in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}, expected (F,) and (F, F) for one F: give "
            "an npz with a mean and a covariance."
        )
    return Statistics(_finite(path, mean, covariance))


def _finite(path: Path, mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> Moments:
    """Return the moments if they are finite; otherwise raise a DataError."""
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} holds a mean or covariance that is NaN or infinite: make the statistics again.")
    return Moments(mean, covariance)
