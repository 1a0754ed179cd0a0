"""From a model on disk to calibrated methods on disk, with a report and a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokdyn
from tokdyn.attach import attachment_of, save, unwrap, wrap
from tokdyn.calibration.caching import CacheCalibration, calibrate_cache
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.calibration.pictures import draw_caching, draw_skipping
from tokdyn.calibration.skipping import SkipCalibration, calibrate_skipping
from tokdyn.calibration.trajectories import Subject, open_subject, trajectories
from tokdyn.files import replacing, require_folder
from tokdyn.host import describe, open_device, product_type, settle_memory
from tokdyn.methods import DepthSkip, FeatureCache

REPORT, PICTURE = "calibration.json", "calibration.png"


@dataclass(frozen=True)
class CalibrateResult:
    """What `tokdyn calibrate` made.

    Attributes:
        folder: with the methods, for `tokdyn.load`, the report and the picture.
        report: what calibration.json holds.
        method: the calibrated one.
    """

    folder: Path
    report: dict[str, Any]
    method: DepthSkip | FeatureCache


def run(config: CalibrateConfig) -> CalibrateResult:
    """Draw images, calibrate on what the model was called with, write methods, report and picture.

    Raises:
        TokdynError: a setting, the model or the folder does not fit.
    """
    settle_memory()
    device = open_device(config.device)
    subject = open_subject(config, device)
    trained = attachment_of(subject.model)
    if trained is not None:  # what is measured is the model at full width
        unwrap(subject.model)
    out = config.out or Path("calibrated", *(part for part in Path(subject.name).parts if part not in ("..", "/")))
    out = out if config.out else out / config.method
    require_folder(out)
    half = product_type(config.precision, device) is not None
    found: SkipCalibration | CacheCalibration
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        calls = trajectories(config, subject)
        if config.method == "skip":
            assert config.flops is not None
            found = calibrate_skipping(
                subject.model,
                calls,
                DepthSkip(),
                config.flops,
                levels=config.levels,
                protected=config.protected,
                sequential=config.sequential,
                errors=True,
            )
        else:
            method = FeatureCache(threshold=config.threshold, indicator=config.indicator)
            found = calibrate_cache(
                subject.model, calls, method, degree=config.degree, flops=config.flops, steps=config.cache_steps
            )
    wrap(subject.model, [found.method])
    try:
        save(subject.model, out)
    finally:
        unwrap(subject.model)
    report = _report(config, subject, found, len(calls), device)
    with replacing(out / REPORT) as half_file:
        half_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if isinstance(found, SkipCalibration):
        draw_skipping(found, out / PICTURE, f"Which blocks matter when: {subject.name}")
    else:
        draw_caching(found, out / PICTURE, f"When the blocks need to run: {subject.name}")
    return CalibrateResult(out, report, found.method)


def _report(
    config: CalibrateConfig,
    subject: Subject,
    found: SkipCalibration | CacheCalibration,
    calls: int,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that was measured and decided, as JSON data. FLOPs count a multiply-add as 2."""
    kind = type(found.method).__name__
    return {
        "tokdyn": tokdyn.__version__,
        "settings": config.model_dump(mode="json"),
        "model": {"name": subject.name, "class": type(subject.model).__name__},
        "scheduler": subject.scheduler,
        "calls": calls,
        "machine": describe(device),
        "method": {"method": kind, **found.method.model_dump(mode="json")},
        **(_of_skipping(found) if isinstance(found, SkipCalibration) else _of_caching(found)),
    }


def _of_skipping(found: SkipCalibration) -> dict[str, Any]:
    measured = found.measured
    return {
        "flops": found.flops,
        "levels": [
            {
                "low": low,
                "high": high,
                "skipped": list(found.skips[row]),
                "relative_error": None if found.error is None else found.error[row],
                "influence": measured.influence[row].tolist(),
                "block_flops": measured.cost[row].tolist(),
                "other_flops": float(measured.other[row]),
            }
            for row, (low, high) in enumerate(measured.bins.rows())
        ],
    }


def _number(value: Tensor) -> float | None:
    """A number that JSON knows: a change from nothing is infinite."""
    return float(value) if value.isfinite() else None


def _of_caching(found: CacheCalibration) -> dict[str, Any]:
    points = [
        {
            "trajectory": step.position.run,
            "branch": step.position.label,
            "step": step.position.steps[sample],
            "sample": sample,
            "level": step.levels[sample],
            "change": _number(step.change[sample]),
            "effect": _number(step.effect[sample]),
        }
        for step in found.steps
        if step.change is not None and step.effect is not None
        for sample in range(len(step.levels))
    ]
    return {
        "flops": found.flops,
        "computed_steps": found.computed,
        "explained_variance": found.fit,
        "points": points,
    }
