"""Calibrate a model on disk and save the calibrated methods, with a report and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokdyn
from tokdyn.attach import attachment_of, save, unwrap, wrap
from tokdyn.calibration.caching import CacheCalibration, calibrate_cache, together
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.calibration.page import write_page
from tokdyn.calibration.pictures import draw_caching, draw_skipping
from tokdyn.calibration.preset_file import write_preset
from tokdyn.calibration.skipping import SkipCalibration, calibrate_skipping
from tokdyn.calibration.trajectories import Subject, open_subject, trajectories
from tokdyn.errors import InputError
from tokdyn.files import replacing, require_folder
from tokdyn.host import describe, open_device, product_type, settle_memory
from tokdyn.methods import DepthSkip, FeatureCache
from tokdyn.pipelines.denoisers import naming
from tokdyn.recorder import Call

REPORT, PICTURE, PAGE = "calibration.json", "calibration.png", "calibration.html"


@dataclass(frozen=True)
class CalibrateResult:
    """What `tokdyn calibrate` found for a model.

    Attributes:
        folder: holds the methods for `tokdyn.load`, the report, the picture and the page.
        report: content of calibration.json.
        method: the calibrated method.
    """

    folder: Path
    report: dict[str, Any]
    method: DepthSkip | FeatureCache


def calibrate_from_disk(config: CalibrateConfig) -> dict[str, CalibrateResult]:
    """Draw images, calibrate on the calls of the model, and write the methods, a report, a picture and a preset file.

    Returns:
        One result, by the name "". Of a pipeline with several denoisers one for each by its name, each calibrated on
        the calls that it got and in a folder of this name, so that `tokdyn.load` takes the folder around them. The
        preset file is in the folder around them.

    Raises:
        TokdynError: a setting, the model or the folder does not fit.
    """
    settle_memory()
    device = open_device(config.device)
    subject = open_subject(config, device)
    for model in subject.models.values():
        if attachment_of(model) is not None:  # calibration measures the model without methods
            unwrap(model)
    out = config.out or Path("calibrated", *(part for part in Path(subject.name).parts if part not in ("..", "/")))
    out = out if config.out else out / config.method
    require_folder(out)
    found: dict[str, SkipCalibration | CacheCalibration] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=product_type(config.precision, device) is not None):
        calls = trajectories(config, subject)
        idle = [name for name in calls if not calls[name]]
        if idle:
            raise InputError(f"{idle[0] or 'the model'} got no calls, so that nothing can be measured; set more steps.")
        for name, model in subject.models.items():
            with naming(name):
                found[name] = _calibrated(config, model, calls[name])
    found = together(found)
    written = {
        name: _written(config, subject, name, result, len(calls[name]), device, out / name)
        for name, result in found.items()
    }
    write_preset(config, subject, found, out)
    return written


def _calibrated(config: CalibrateConfig, model: nn.Module, calls: list[Call]) -> SkipCalibration | CacheCalibration:
    """Calibrate the method of the settings on the calls of a model."""
    if config.method == "skip":
        assert config.flops is not None
        return calibrate_skipping(
            model,
            calls,
            DepthSkip(),
            config.flops,
            levels=config.levels,
            protected=config.protected,
            sequential=config.sequential,
            errors=True,
        )
    settings: dict[str, Any] = {"threshold": config.given_threshold, "indicator": config.indicator}
    if config.method == "mag":
        settings |= {"rule": "magcache", "ratios": (1.0,), "start": config.start, "max_reused": config.max_reused}
    method = FeatureCache(**settings)
    return calibrate_cache(model, calls, method, degree=config.degree, flops=config.flops, steps=config.cache_steps)


def _written(
    config: CalibrateConfig,
    subject: Subject,
    name: str,
    result: SkipCalibration | CacheCalibration,
    calls: int,
    device: torch.device,
    out: Path,
) -> CalibrateResult:
    """Write the methods, the report, the picture and the page of a model."""
    model = wrap(subject.models[name], [result.method])
    try:
        save(model, out)
    finally:
        unwrap(model)
    report = _report(config, subject, name, result, calls, device)
    with replacing(out / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    title = f"{subject.name}, {name}" if name else subject.name
    if isinstance(result, SkipCalibration):
        draw_skipping(result, out / PICTURE, f"Which blocks matter when: {title}")
    else:
        draw_caching(result, out / PICTURE, f"When the blocks need to run: {title}")
    write_page(report, out / PICTURE, out / PAGE, title)
    return CalibrateResult(out, report, result.method)


def _report(
    config: CalibrateConfig,
    subject: Subject,
    name: str,
    result: SkipCalibration | CacheCalibration,
    calls: int,
    device: torch.device,
) -> dict[str, Any]:
    """Collect all measurements and decisions as JSON data; a multiply-add is 2 FLOPs."""
    kind = type(result.method).__name__
    return {
        "tokdyn": tokdyn.__version__,
        "settings": config.model_dump(mode="json"),
        "model": {"name": subject.name, "class": type(subject.models[name]).__name__},
        "scheduler": subject.scheduler,
        "calls": calls,
        "machine": describe(device),
        "method": {"method": kind, **result.method.model_dump(mode="json")},
        **(_report_skipping(result) if isinstance(result, SkipCalibration) else _report_caching(result)),
    }


def _report_skipping(result: SkipCalibration) -> dict[str, Any]:
    measured = result.measured
    return {
        "flops": result.flops,
        "levels": [
            {
                "low": low,
                "high": high,
                "skipped": list(result.skips[row]),
                "relative_error": None if result.error is None else result.error[row],
                "influence": measured.influence[row].tolist(),
                "block_flops": measured.cost[row].tolist(),
                "other_flops": float(measured.other[row]),
            }
            for row, (low, high) in enumerate(measured.bins.rows())
        ],
    }


def _finite(value: Tensor) -> float | None:
    """Return a number, or None if it is infinite, which JSON does not have."""
    return float(value) if value.isfinite() else None


def _report_caching(result: CacheCalibration) -> dict[str, Any]:
    points = [
        {
            "trajectory": step.position.trajectory,
            "branch": step.position.label,
            "step": step.position.steps[sample],
            "sample": sample,
            "level": step.levels[sample],
            "change": _finite(step.change[sample]),
            "effect": _finite(step.effect[sample]),
        }
        for step in result.steps
        if step.change is not None and step.effect is not None
        for sample in range(len(step.levels))
    ]
    return {
        "flops": result.flops,
        "computed_steps": result.computed,
        "explained_variance": result.fit,
        **({} if result.ratios is None else {"ratios": asdict(result.ratios)}),
        "points": points,
    }
