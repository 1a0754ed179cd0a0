"""Hold the result of an evaluation, with everything that is needed to repeat it, and write it as JSON."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tokdyn import __version__
from tokdyn.evaluate.config import EvalConfig
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.files import replacing

PACKAGES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")


class EvalResult(BaseModel):
    """The result of one evaluation.

    Attributes:
        values: The metrics by name. FID, IS and KID are measured with the published Inception network; other names end
            with the name of the network in brackets.
        spread: Standard deviation of a metric over its subsets (kernel distance) or parts (class score), by name.
        reference_values: Class score and accuracy of the reference images, to compare those of generated images with.
        generated_images: Number of generated images that were measured.
        reference_images: Number of reference images; None without a reference, or if its file does not say.
        extractor: Identity of the network.
        used: Values of the settings that are reduced for small sets, as used.
        warnings: Sentences about what makes a metric unreliable or hard to compare.
        notes: Sentences about settings that were reduced and metrics that were left out.
        config: The settings as the user gave them.
        versions: Versions of Python and of the packages that the metrics depend on.
        machine: Machine that the evaluation ran on.
        seconds: Wall time of each part of the evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: dict[str, float]
    spread: dict[str, float]
    reference_values: dict[str, float]
    generated_images: int
    reference_images: int | None
    extractor: ExtractorInfo
    used: dict[str, int]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    config: EvalConfig
    versions: dict[str, str]
    machine: dict[str, str | int]
    seconds: dict[str, float]

    def to_json(self) -> str:
        """Return indented JSON, which `EvalResult.model_validate_json` reads back."""
        return self.model_dump_json(indent=2)

    def save(self, path: Path) -> None:
        """Write the result as JSON, atomically; creates the folder if needed."""
        with replacing(path) as half:
            half.write_text(self.to_json() + "\n", encoding="utf-8")


def metric_name(metric: str, extractor: ExtractorInfo) -> str:
    """Return the name of a metric in a result: FID, IS or KID, or the metric with the network's name in brackets.

    Args:
        metric: `frechet_distance`, `class_score`, `kernel_distance`, `precision`, `recall` or `class_accuracy`.
        extractor: Identity of the network that it was measured with.
    """
    inception = {"frechet_distance": "FID", "class_score": "IS", "kernel_distance": "KID"}
    if extractor.standard and metric in inception:
        return inception[metric]
    return f"{metric}[{extractor.name}]"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the metrics depend on."""
    return {
        "python": platform.python_version(),
        "tokdyn": __version__,
        **{name: version(name) for name in PACKAGES},
    }
