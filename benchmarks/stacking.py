"""Other methods on the upcycled model of the CIFAR-10 study: FLOPs, time and images beside those of the base.

    python -m benchmarks.upcycling train runs/cifar10 --data cifar10_train.zip
    python -m benchmarks.stacking runs/cifar10 --reference cifar10_test.zip --judge cifar10_resnet56.ts

All images are drawn with guidance, by the same sampler and from the same seeds. Writes the stacks as YAML, what
`tokdyn bench quality` finds of them to `benchmarks/results/stacking.json`, the Pareto picture, and prints the table and
whether the bars are met: the full stack saves 40% of the base's FLOPs, and its time saving is 0.85 of that or more.
Continues where it was stopped; ends with exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import markdown
from tokdyn.bench import timing
from tokdyn.bench.quality import QualityConfig, bench_quality
from tokdyn.bench.quality_page import columns, write_page
from tokdyn.bench.stacks import read_stacks
from tokdyn.calibration.command import run
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.methods.written import written
from tokdyn.recipe import yaml_text

SAVED, REALISED = 0.40, 0.85
LITE = {"uncond_tail_drop": 0.9}
FULL = "+ TokenMerge"


def stacks(given: argparse.Namespace) -> list[dict[str, Any]]:
    """The stacks; those with a plus have one method more than the one before."""
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
    """A cache that computes the blocks in a share of the steps, calibrated on images that the model draws."""
    out = given.work / "calibrated" / Path(model).parts[-3 if "checkpoints" in Path(model).parts else -1]
    config = CalibrateConfig(
        model=model, method="cache", out=out, cache_steps=given.cache_steps, scheduler="dpm", steps=given.steps,
        guidance=given.guidance, count=16, batch_size=16,
    )  # fmt: skip
    return written(run(config).method)


def by_name(content: dict[str, Any]) -> dict[str, Any]:
    """The same with names of runs and files where there were paths of a machine."""
    settings = {key: value for key, value in content["settings"].items() if key != "out"}
    settings |= {key: Path(settings[key]).name for key in ("reference", "extractor")}
    rows = []
    for row in content["rows"]:
        parts = [part for part in Path(row["model"]).parts if part not in ("model", "ema", "checkpoints")]
        rows.append({**row, "model": "/".join(parts[-2:] if parts[-1].startswith("step_") else parts[-1:])})
    return {**content, "settings": settings, "rows": rows}


def main() -> None:
    """Calibrate, draw, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--timed", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("runs/stacking"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stacking.json"))
    parser.add_argument("--figures", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, help="processor threads; all by default")
    given = parser.parse_args()
    given.base = given.base or given.runs / "dit-base"
    given.plain = given.plain or given.runs / "distilled-0" / "checkpoints" / "step_0001000"
    given.width = given.width or given.runs / "width-0"
    timing.prepare(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    asked = given.work / "stacks.yaml"
    if not asked.exists():
        asked.write_text(yaml_text.dump(stacks(given)))
    config = QualityConfig(
        out=given.work, count=given.count, batch_size=100, scheduler="dpm", steps=given.steps, guidance=given.guidance,
        reference=given.reference, extractor=str(given.judge), rounds=given.rounds, timed=given.timed, precision="fp32",
    )  # fmt: skip
    result = bench_quality(config, read_stacks([str(asked)]))
    files = write_page(config, result)
    content = json.loads(files[0].read_text())
    (full,) = (row for row in result.rows if row.name == FULL)
    assert full.flops_saved is not None
    assert full.time_saved is not None
    realised = full.time_saved / full.flops_saved
    met = full.flops_saved >= SAVED and realised >= REALISED
    content["bars"] = {"stack": full.name, "flops_saved": full.flops_saved, "realised": realised, "met": met}
    timing.write(given.out, by_name(content))
    for file in files[2:]:
        shutil.copyfile(file, given.figures / f"cifar10-stacking-{file.name}")
    found = columns(result.rows)
    print(markdown.table(list(found), zip(*found.values(), strict=True)))
    verdict = "met" if met else "MISSED"
    print(f"{full.name}: {full.flops_saved:.1%} of the FLOPs are saved, {realised:.2f} of that in time: {verdict}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
