"""Stacks of methods on the upcycled model of the CIFAR-10 study: FLOPs, time and images beside those of the base.

    python -m benchmarks.upcycling train runs/cifar10 --data cifar10_train.zip
    python -m benchmarks.stacking runs/cifar10 --reference cifar10_test.zip --judge cifar10_resnet56.ts

All images are drawn with guidance, by the same sampler and from the same seeds. Writes the stacks as YAML, the
results of `tokdyn bench quality` to `benchmarks/results/stacking.json`, and the Pareto picture; prints the table and
whether the targets are met: the full stack saves 40% of the base's FLOPs, and at least 0.85 of that share in time. A
stopped command can be repeated. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import command_line, markdown
from tokdyn.bench import timing
from tokdyn.bench.quality import bench_quality
from tokdyn.bench.quality_page import columns, write_page
from tokdyn.bench.settings import QualityConfig
from tokdyn.bench.stacks import read_stacks
from tokdyn.calibration.command import calibrate_from_disk
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.methods.registry import to_settings
from tokdyn.recipe import yaml_text

SAVED, REALISED = 0.40, 0.85
LITE = {"uncond_tail_drop": 0.9}
FULL = "+ TokenMerge"


def stacks(given: argparse.Namespace) -> list[dict[str, Any]]:
    """List the stacks; a plus means one more method than the stack before."""
    base, plain, width = str(given.base), str(given.plain), str(given.width)
    cache = [_cache(width, given)]
    merge = [{"method": "TokenMerge", "ratio": 0.3}]
    return [
        {"name": "DiT, the base", "model": base},
        {"name": "DiT, FeatureCache", "model": base, "methods": [_cache(base, given)]},
        {"name": "DC-DiT", "model": plain},
        {"name": "DC-DiT, tail drop 0.3", "model": plain, "tail_drop": 0.3},
        {"name": "DC-DiT, Lite-CFG", "model": plain, **LITE},
        {"name": "+ DynamicWidth", "model": width, **LITE},
        {"name": "+ FeatureCache", "model": width, "methods": cache, **LITE},
        {"name": FULL, "model": width, "methods": cache + merge, **LITE},
    ]


def _cache(model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Calibrate a cache that computes the blocks in a share of the steps, on images that the model draws."""
    out = given.work / "calibrated" / Path(model).parts[-3 if "checkpoints" in Path(model).parts else -1]
    config = CalibrateConfig(
        model=model, method="cache", out=out, cache_steps=given.cache_steps, scheduler="dpm", steps=given.steps,
        guidance=given.guidance, count=16, batch_size=16,
    )  # fmt: skip
    return to_settings(calibrate_from_disk(config)[""].method)


def by_name(content: dict[str, Any]) -> dict[str, Any]:
    """Replace the paths of this machine by names of runs and files."""
    settings = {key: value for key, value in content["settings"].items() if key != "out"}
    settings |= {key: Path(settings[key]).name for key in ("reference", "extractor")}
    rows = []
    for row in content["rows"]:
        parts = [part for part in Path(row["model"]).parts if part not in ("model", "ema", "checkpoints")]
        rows.append({**row, "model": "/".join(parts[-2:] if parts[-1].startswith("step_") else parts[-1:])})
    return {**content, "settings": settings, "rows": rows}


def main() -> int:
    """Calibrate, draw and measure."""
    parser = command_line.parser(__doc__, "benchmarks/results/stacking.json", rounds=9, figures="docs/results")
    parser.add_argument("runs", type=Path, help="folder of the study")
    parser.add_argument("--base", type=Path, help="run of the base; RUNS/dit-base by default")
    parser.add_argument("--plain", type=Path, help="DC-DiT at a quarter of the base's images")
    parser.add_argument("--width", type=Path, help="the same with dynamic width; RUNS/width-0 by default")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--cache-steps", type=float, default=0.6)
    parser.add_argument("--timed", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("runs/stacking"))
    given = command_line.start(parser.parse_args())
    given.base = given.base or given.runs / "dit-base"
    given.plain = given.plain or given.runs / "distilled-0" / "checkpoints" / "step_0001000"
    given.width = given.width or given.runs / "width-0"
    given.work.mkdir(parents=True, exist_ok=True)
    file = given.work / "stacks.yaml"
    if not file.exists():
        file.write_text(yaml_text.dump(stacks(given)))
    config = QualityConfig(
        out=given.work, count=given.count, batch_size=100, scheduler="dpm", steps=given.steps, guidance=given.guidance,
        reference=given.reference, extractor=str(given.judge), rounds=given.rounds, timed=given.timed, precision="fp32",
    )  # fmt: skip
    result = bench_quality(config, read_stacks([str(file)]))
    files = write_page(config, result)
    content = json.loads(files[0].read_text())
    (full,) = (row for row in result.rows if row.name == FULL)
    assert full.flops_saved is not None
    assert full.time_saved is not None
    realised = full.time_saved / full.flops_saved
    met = full.flops_saved >= SAVED and realised >= REALISED
    content["bars"] = {"stack": full.name, "flops_saved": full.flops_saved, "realised": realised, "met": met}
    timing.write(given.out, by_name(content))
    for picture in files[2:]:
        shutil.copyfile(picture, given.figures / f"cifar10-stacking-{picture.name}")
    table = columns(result.rows)
    print(markdown.table(list(table), zip(*table.values(), strict=True)))
    print(f"{full.name} saves {full.flops_saved:.1%} of the FLOPs, and {realised:.2f} times that share of time")
    return command_line.finish([] if met else [f"FLOPs saved {SAVED:.0%}, realised {REALISED}"])


if __name__ == "__main__":
    sys.exit(main())
