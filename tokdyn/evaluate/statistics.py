"""Compute, save and load the statistics of a set of images: features, and their mean and covariance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics

from tokdyn.errors import DataError
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.npz import npz_array
from tokdyn.files import replacing
from tokdyn.reading import one_line, open_regular, parse_json

FORMAT = 1


class Origin(BaseModel):
    """Where statistics come from.

    Attributes:
        format: Version of the file layout.
        extractor: Network that computed the features.
        images: Number of images.
        image_size: (rows, columns) of the extractor's inputs, or None if they differed.
        source: Name of the folder or file of images.
        fingerprint: Hash of the names, sizes and CRC-32 of the images in `source`, with the choice made from them.
        published_moments: Whether mean and covariance were stored beside the images, not computed from them.
        values: Class score and accuracy of the images, by name.
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
    """The mean (F,) and the covariance (F, F) of features, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """The statistics of a set of images.

    Attributes:
        moments: Mean and covariance of the features.
        features: (N, F) float32, or None if the file holds the moments only.
        origin: Where the statistics come from, or None if the file does not say.
    """

    moments: Moments
    features: Tensor | None = None
    origin: Origin | None = None


def moments_of(features: Tensor) -> Moments:
    """Compute the moments of features (N, F), N at least 2, in float64."""
    statistics = fid_features_to_statistics(features.double())
    return Moments(statistics["mu"], np.atleast_2d(statistics["sigma"]))


def save_statistics(path: Path, features: Tensor, moments: Moments, origin: Origin) -> None:
    """Write features (N, F), moments and origin to a safetensors file, atomically."""
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
        DataError: The file is damaged, or was not written by `save_statistics`.
    """
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # a damaged or hostile header can raise anything
        raise DataError(
            f"{path} cannot be read as cached statistics ({one_line(error)}): delete it and make it again."
        ) from error
    try:
        origin = Origin.model_validate(parse_json(metadata["tokdyn"]))
        features, mean, covariance = (
            tensors["features"],
            tensors["mu"].double().numpy(),
            tensors["sigma"].double().numpy(),
        )
    except (KeyError, ValueError, ValidationError) as error:
        raise DataError(
            f"{path} was not written by tokdyn eval: make statistics with cache=FILE.safetensors."
        ) from error
    if origin.format != FORMAT:
        raise DataError(
            f"{path} has format {origin.format}, and this version of tokdyn reads {FORMAT}: make it again with cache=."
        )
    width = features.shape[-1] if features.dim() else 0
    if features.shape != (origin.images, width) or mean.shape != (width,) or covariance.shape != (width, width):
        raise DataError(
            f"{path} is damaged, its arrays do not have the shapes (N, F), (F,) and (F, F): delete it and make it "
            "again."
        )
    return Statistics(_finite(path, mean, covariance), features, origin)


def load_moments(path: Path) -> Statistics:
    """Read the mean `mu` and the covariance `sigma` of an npz, the form in which statistics are published.

    Returns:
        The statistics, without features and without an origin, because the file does not say which network made them.

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
    """Return the moments; raise a DataError if they are not finite."""
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} holds a mean or covariance that is NaN or infinite: make the statistics again.")
    return Moments(mean, covariance)
