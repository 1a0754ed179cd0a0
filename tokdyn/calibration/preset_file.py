"""Write what a calibration found as a preset file, with how it was found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import tokdyn
from tokdyn.calibration.caching import CacheCalibration
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.calibration.skipping import SkipCalibration
from tokdyn.calibration.threshold import simulate
from tokdyn.calibration.trajectories import Subject
from tokdyn.methods import Method
from tokdyn.presets import Calibration, Entry, Family, Setting, write

FILE = "preset.yaml"
SETTING = "calibrated"
Found = SkipCalibration | CacheCalibration


def write_preset(config: CalibrateConfig, subject: Subject, found: Mapping[str, Found], folder: Path) -> Path:
    """Write a preset file with one setting, "calibrated".

    Args:
        config: settings of the calibration.
        subject: the model or models.
        found: the result of each, by the name of the denoiser; "" is the only one.
        folder: where to.

    Returns:
        The path of the file.
    """
    methods: dict[str, list[Method]] = {name: [each.method] for name, each in found.items()}
    labels = _labels(config, subject)
    drawn = [labels[image % len(labels)] for image in range(config.count)]
    calibration = Calibration(
        tokdyn=tokdyn.__version__,
        prompts=len(set(drawn)),
        prompts_sha256=hashlib.sha256("\n".join(sorted(set(drawn))).encode()).hexdigest(),
        seeds=[config.seed + image for image in range(config.count)],
        scheduler=subject.scheduler,
        guidance=config.guidance if "guidance" in config.model_fields_set else None,
        fingerprints={name: str(each.method.fingerprint) for name, each in found.items()},
        spread={name: _spread(each) for name, each in found.items()},
        computed={name: _share(each) for name, each in found.items()},
    )
    setting = Setting(
        methods=methods.get("", methods),
        steps=config.steps if config.prompts is None or "steps" in config.model_fields_set else _steps(found),
        calibration=calibration,
    )
    first = next(iter(subject.models.values()))
    names = ["transformer"] if "" in methods else list(methods)
    about = {"name": subject.name, "class": type(first).__name__, "denoisers": names, "named": True}
    entry = Entry.model_validate({**about, "settings": {SETTING: setting}})
    return write(Family(family=subject.name, models=[entry]), folder / FILE)


def _labels(config: CalibrateConfig, subject: Subject) -> list[str]:
    """Return what images were drawn for, as text: prompts, with their arguments, or classes."""
    if config.prompts is None:
        return [str(label) for label in subject.classes]
    return [each if isinstance(each, str) else json.dumps(each, sort_keys=True) for each in config.prompts]


def _steps(found: Mapping[str, Found]) -> int | None:
    """Return the number of steps of the run that the fingerprints of caches hold; None if there is none."""
    counts = [_sampler_steps(str(each.method.fingerprint)) for each in found.values()]
    return sum(counts) if counts and all(counts) else None


def _sampler_steps(fingerprint: str) -> int:
    return int(fingerprint.split(":")[3].partition("@")[0]) if fingerprint.count(":") > 2 else 0


def _share(found: Found) -> float:
    return round(found.flops if isinstance(found, SkipCalibration) else found.computed, 6)


def _spread(found: Found) -> dict[str, float]:
    """Return how much measurements differ from image to image.

    For DepthSkip this is the standard deviation of the influence of a block over images, relative to its mean, averaged
    over blocks and noise levels. For FeatureCache it is the share of computed steps, the least and the most of an
    image, with the explained variance of the polynomial, or with the largest standard deviation of a ratio over images
    and its largest difference between guidance branches.
    """
    if isinstance(found, SkipCalibration):
        mean = found.measured.influence.clamp(min=torch.finfo(torch.float64).tiny)
        relative = torch.where(found.measured.influence > 0, found.measured.deviation / mean, 0.0)
        return {"relative_deviation_of_influence": round(float(relative.mean()), 6)}
    shares = _computed_by_image(found)
    spread = {"least_computed": round(min(shares), 6), "most_computed": round(max(shares), 6)}
    if found.ratios is not None:
        return spread | {
            "deviation_of_ratios": round(found.ratios.deviation, 6),
            "difference_of_branches": round(found.ratios.difference, 6),
        }
    return spread if found.fit is None else spread | {"explained_variance": round(found.fit, 6)}


def _computed_by_image(found: CacheCalibration) -> Sequence[float]:
    """Return the share of computed steps of every image of every branch."""
    images: dict[object, list[bool]] = {}
    for step, reuse in zip(found.steps, simulate(found.steps, found.local), strict=True):
        for sample, reused in enumerate(reuse.tolist()):
            images.setdefault((step.position.trajectory, step.position.branch, sample), []).append(reused)
    return [1.0 - sum(each) / len(each) for each in images.values()]
