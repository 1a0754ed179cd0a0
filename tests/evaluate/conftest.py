"""Images whose pixels are their features, and an extractor that returns them."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

Pixels = NDArray[np.uint8]


class PixelValues(nn.Module):
    """Features are pixel values in [0, 1], averaged down to 2 x 2; logits are the first four, times `scale`."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return features, features[:, :4] * self.scale


@dataclass(frozen=True)
class Kit:
    """Writes files for a test, and computes the outputs of `PixelValues` for images of 2 x 2 pixels."""

    folder: Path

    @staticmethod
    def draw(count: int, seed: int, low: int = 0, high: int = 256, side: int = 2) -> Pixels:
        """Draw random images (count, side, side, 3)."""
        return np.random.default_rng(seed).integers(low, high, (count, side, side, 3), dtype=np.uint8)

    @staticmethod
    def features(images: Pixels) -> NDArray[np.float64]:
        """Return the features (N, 12) of images (N, 2, 2, 3)."""
        return images.transpose(0, 3, 1, 2).reshape(len(images), -1) / 255.0

    @staticmethod
    def logits(images: Pixels, scale: float = 1.0) -> NDArray[np.float64]:
        """Return the logits (N, 4) of images (N, 2, 2, 3)."""
        return Kit.features(images)[:, :4] * scale

    @staticmethod
    def png(image: Pixels) -> bytes:
        """Encode an image (H, W, 3) as a PNG file."""
        content = BytesIO()
        Image.fromarray(image).save(content, "png")
        return content.getvalue()

    def torchscript(self, name: str, network: nn.Module | None = None, scale: float = 1.0) -> Path:
        """Save a scripted network, `PixelValues(scale)` by default."""
        path = self.folder / f"{name}.ts"
        with warnings.catch_warnings():  # torch warns that TorchScript is deprecated
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script((network or PixelValues(scale)).eval()).save(str(path))
        return path

    def npz(self, name: str, images: Pixels, labels: NDArray[np.int64] | None = None) -> Path:
        """Save images (N, H, W, 3) as `tokdyn sample format=npz` does."""
        path = self.folder / f"{name}.npz"
        np.savez(path, images, *([] if labels is None else [labels]))
        return path

    def zip(self, name: str, files: dict[str, Pixels | bytes]) -> Path:
        """Save a zip of PNG files, or of bytes as they are."""
        path = self.folder / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in files.items():
                archive.writestr(file, content if isinstance(content, bytes) else self.png(content))
        return path

    def tree(self, name: str, files: dict[str, Pixels | bytes]) -> Path:
        """Save a folder of PNG files, or of bytes as they are."""
        for file, content in files.items():
            path = self.folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else self.png(content))
        return self.folder / name


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a TorchScript `PixelValues` called judge, and return its path."""
    return str(Kit(tmp_path_factory.mktemp("judge")).torchscript("judge"))
