"""Run feature extractors: networks that map uint8 images to features and, if they have a classifier, to logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tokdyn.errors import CheckpointError

Forward = Callable[[Tensor], object]


class ExtractorInfo(BaseModel):
    """The identity of an extractor. Metrics can be compared only if they were measured with the same extractor.

    Attributes:
        kind: Where the network comes from.
        name: Name of the network, which is part of the names of its metrics.
        sha256: Hash of the weights (Inception), of the program file (TorchScript), or of name and tensors (timm).
        input_size: Side in pixels that images are resized to beforehand; None leaves them at their own size.
        standard: Whether it is the published Inception network; only its metrics are called FID, IS and KID.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["inception", "torchscript", "timm"]
    name: str
    sha256: str
    input_size: int | None = None
    standard: bool = False

    def same_network(self, other: ExtractorInfo) -> bool:
        """Return whether features of the two extractors can be compared. The name does not matter."""
        return (self.kind, self.sha256, self.input_size) == (other.kind, other.sha256, other.input_size)

    def __str__(self) -> str:
        size = "" if self.input_size is None else f", images at {self.input_size} pixels"
        return f"{self.kind} extractor {self.name} (sha256 {self.sha256[:12]}{size})"


@dataclass(frozen=True)
class Outputs:
    """Outputs of an extractor for B images, on the CPU.

    Attributes:
        features: (B, F) float32.
        logits: (B, C) float32, or None for an extractor without a classifier.
    """

    features: Tensor
    logits: Tensor | None


@dataclass(frozen=True)
class Extractor:
    """A network together with its identity; calling it computes the features of images.

    Attributes:
        info: Identity of the network.
        forward: Takes uint8 (B, 3, H, W) on `device`; returns features (B, F), or (features, logits (B, C)), or a
            mapping with the keys `features` and, if it has a classifier, `logits`.
        device: Device of the network.
    """

    info: ExtractorInfo
    forward: Forward
    device: torch.device

    def __call__(self, images: Tensor) -> Outputs:
        """Compute features and logits of uint8 images (B, 3, H, W).

        Raises:
            CheckpointError: The network fails on the images, or does not return what `forward` has to return.
        """
        try:
            with torch.inference_mode():
                raw = self.forward(images.to(self.device))
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"{self.info.name} ran out of memory on {len(images)} images of {tuple(images.shape[1:])}: "
                "lower batch_size or input_size."
            ) from error
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            raise CheckpointError(
                f"{self.info.name} cannot take uint8 images of shape {tuple(images.shape)} ({reason.strip()}): "
                "set input_size to the size it expects, or use another extractor."
            ) from error
        return _read_outputs(raw, len(images), self.info.name)


def _read_outputs(raw: object, count: int, name: str) -> Outputs:
    """Convert what a network returned for `count` images to `Outputs`.

    Raises:
        CheckpointError: It is not what `Extractor.forward` has to return.
    """
    features: object
    logits: object
    if isinstance(raw, Tensor):
        features, logits = raw, None
    elif isinstance(raw, Mapping) and "features" in raw and set(raw) <= {"features", "logits"}:
        features, logits = raw["features"], raw.get("logits")
    elif isinstance(raw, (tuple, list)) and len(raw) in (1, 2):
        features, logits = raw[0], raw[1] if len(raw) == 2 else None
    else:
        raise CheckpointError(
            f"{name} returned {_describe(raw)}: an extractor returns features (B, F), or (features, logits (B, C)), or "
            "a dict with the keys 'features' and 'logits'."
        )
    return Outputs(
        _matrix(features, count, name, "features"), None if logits is None else _matrix(logits, count, name, "logits")
    )


def _matrix(value: object, count: int, name: str, what: str) -> Tensor:
    """Return a matrix with `count` rows as float32 on the CPU.

    Args:
        value: Output of the network.
        count: Number of images.
        name: The network's name, for error messages.
        what: "features" or "logits", for error messages.

    Raises:
        CheckpointError: `value` is not such a matrix, or has NaN or infinite elements.
    """
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != count or value.shape[1] == 0:
        raise CheckpointError(
            f"{name} returned {_describe(value)} as {what} of {count} images, expected a tensor of shape ({count}, "
            "width): use an extractor that returns one row per image."
        )
    matrix = value.detach().to("cpu", torch.float32)
    if not torch.isfinite(matrix).all():
        raise CheckpointError(f"{name} returned {what} that are NaN or infinite: check its weights.")
    return matrix


def _describe(value: object) -> str:
    """Describe an unexpected output for an error message, such as "a tensor of shape (2, 3, 4)"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
