"""Every caching rule on a trained DiT, alone, with TokenMerge and with DepthSkip: quality against time.

    tokdyn train cifar10/dit-base data.path=cifar10_train.zip out=runs/cifar10/dit-base training.precision=fp32
    python -m benchmarks.cache_pareto runs/cifar10/dit-base --reference cifar10_test.zip --judge cifar10_resnet56.ts

Each rule computes the blocks in two shares of the steps, as nearly as its threshold allows: that is searched on images
from other seeds than those that are measured. TeaCache's polynomials, MagCache's ratios and the table of DepthSkip are
calibrated on these, too. Then `tokdyn bench quality` draws the same images with every stack, by the same sampler, and
times them in turn. Writes `benchmarks/results/cache-pareto.json` and `cifar10-cache-pareto.png`, and prints the table
(`--table FILE` prints it again and draws the picture from the JSON). A stopped command can be repeated: calibrations,
thresholds and images that exist are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import tokdyn
from benchmarks import command_line, markdown
from benchmarks.cache_pareto_picture import draw
from benchmarks.stacking import by_name
from tokdyn.bench import timing
from tokdyn.bench.quality import bench_quality
from tokdyn.bench.quality_page import write_page
from tokdyn.bench.settings import QualityConfig
from tokdyn.bench.stacks import Stack, open_stack
from tokdyn.calibration.command import REPORT, calibrate_from_disk
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.diffusion.sampling import generate

Settings = dict[str, Any]

LISTED: dict[str, Settings] = {
    "listed steps": {},
    "listed, forecast 1": {"forecast": 1},
    "listed, forecast 2": {"forecast": 2},
    "listed, Chebyshev": {"forecast": "chebyshev"},
}
"""Rules that compute evenly spaced steps."""
DECIDED: dict[str, Settings] = {
    "TeaCache, input": {"indicator": "input"},
    "TeaCache, first block": {"indicator": "first_block"},
    "TeaCache, time": {"indicator": "time"},
    "MagCache": {"rule": "magcache"},
    "EasyCache": {"rule": "easycache"},
    "SeaCache": {"rule": "seacache"},
}
"""Rules that a threshold decides."""
NO_CACHE = "no cache"
COMPANIONS = ("alone", "TokenMerge", "DepthSkip")
SCHEDULER: Final = "dpm"
BATCH = 100
WARMUP = 2
"""Steps that every rule with a threshold computes first; each computes the last one, too."""
MERGED, FLOPS = 0.3, 0.8
"""Share of the tokens that TokenMerge merges, and of the FLOPs that DepthSkip leaves."""


def calibrated(given: argparse.Namespace, name: str, **settings: Any) -> Settings:
    """Calibrate a method on images that the model draws, unless that is done, and return its settings."""
    out = given.work / "calibrated" / name
    if not (out / REPORT).is_file():
        config = CalibrateConfig(
            model=str(given.model), out=out, scheduler=SCHEDULER, steps=given.steps, guidance=given.guidance,
            seed=given.count, count=given.searched, batch_size=given.searched, precision="fp32", **settings,
        )  # fmt: skip
        calibrate_from_disk(config)
    method: Settings = json.loads((out / REPORT).read_text())["method"]
    return method


def decided(given: argparse.Namespace, rule: str) -> Settings:
    """Return the settings of a rule without its threshold, calibrated if it needs numbers of the model."""
    own, name = DECIDED[rule], rule.lower().replace(", ", "-").replace(" ", "-")
    if rule.startswith("TeaCache"):
        own = calibrated(given, name, method="cache", **own)
    elif rule == "MagCache":
        own = calibrated(given, name, method="mag", start=0.0, max_reused=None)
    return {"method": "FeatureCache", **own, "warmup": WARMUP, "num_steps": given.steps}


def spaced(steps: int, share: float) -> list[int]:
    """List a share of the steps, evenly spaced, the first and the last one among them."""
    number = max(2, round(share * steps))
    return sorted({round(place * (steps - 1) / (number - 1)) for place in range(number)})


def computed_share(given: argparse.Namespace, cache: Settings, threshold: float) -> float:
    """Draw images with a cache, and return the share of their steps and branches in which the blocks ran."""
    cache = {**cache, "threshold": threshold}
    opened = open_stack(Stack(name="searched", model=str(given.model), methods=(cache,)))
    seeds = [given.count + number for number in range(given.searched)]
    sampler = opened.sampler(SCHEDULER, given.steps, given.guidance)
    generate(opened.model, sampler, opened.objective, opened.labels(given.searched), seeds)
    calls = tokdyn.stats(opened.model).calls
    return 1 - sum(call.reused for call in calls) / sum(call.samples for call in calls)


def search(share_at: Callable[[float], float], target: float, tolerance: float) -> tuple[float, float]:
    """Search the threshold with which a cache computes a share of the steps; the nearest of 14 if none does.

    Args:
        share_at: measures the share of computed steps with a threshold; it falls as the threshold rises.
        target: the share to meet.
        tolerance: distance from it at which the search ends.

    Returns:
        The threshold, with 4 digits, and the share of computed steps.
    """
    low, high, tried = 1e-3, 3.0, {}
    for _ in range(14):
        threshold = float(f"{(low * high) ** 0.5:.4g}")
        tried[threshold] = share = share_at(threshold)
        if abs(share - target) <= tolerance:
            break
        low, high = (threshold, high) if share > target else (low, threshold)
    return min(tried.items(), key=lambda item: abs(item[1] - target))


def caches(given: argparse.Namespace) -> dict[str, list[Settings]]:
    """Return the settings of each rule at every budget, under "cache", with the share of steps that it computes.

    What was searched before is read from the work folder.
    """
    file = given.work / "caches.json"
    wanted = {key: str(getattr(given, key)) for key in ("model", "steps", "guidance", "count", "searched")}
    known: Settings = json.loads(file.read_text()) if file.is_file() else {"settings": wanted, "found": {}}
    if known["settings"] != wanted:
        before = " ".join(f"{key}={value}" for key, value in known["settings"].items() if wanted[key] != value)
        sys.exit(f"{given.work} was searched with {before}; choose another --work, or delete it.")
    found: dict[str, Settings] = known["found"]
    rows: dict[str, list[Settings]] = {}
    for rule, budget in ((rule, budget) for rule in (*LISTED, *DECIDED) for budget in given.budgets):
        key = f"{rule}, {budget:.0%}"
        if rule in LISTED:
            steps = spaced(given.steps, budget)
            cache = {"method": "FeatureCache", "steps": steps, **LISTED[rule]}
            found[key] = {"cache": cache, "computed": len(steps) / given.steps}
        elif key not in found:
            settings = decided(given, rule)
            threshold, share = search(partial(computed_share, given, settings), budget, tolerance=0.2 / given.steps)
            found[key] = {"cache": {**settings, "threshold": threshold}, "computed": share}
            print(f"{key}: threshold {threshold:g} computes {share:.1%} of the steps", flush=True)
        timing.write(file, {"settings": wanted, "found": found})
        rows.setdefault(rule, []).append({"budget": budget, **found[key]})
    return rows


def plan(given: argparse.Namespace) -> Iterator[Settings]:
    """Yield each row to measure: a rule, its budget and the share that it computes, a companion, and the methods."""
    skip = calibrated(given, "depth-skip", method="skip", flops=FLOPS, protected=(0, -1))
    beside = dict(zip(COMPANIONS, ([], [{"method": "TokenMerge", "ratio": MERGED}], [skip]), strict=True))
    without = {"budget": 1.0, "cache": None, "computed": 1.0}
    for rule, budgets in {NO_CACHE: [without], **caches(given)}.items():
        for each in budgets:
            name = rule if each["cache"] is None else f"{rule}, {each['budget']:.0%}"
            for companion, more in beside.items():
                yield {
                    "name": name if companion == "alone" else f"{name} + {companion}",
                    "rule": rule, "companion": companion, "budget": each["budget"], "computed": each["computed"],
                    "settings": [*([] if each["cache"] is None else [each["cache"]]), *more],
                }  # fmt: skip


def measured(given: argparse.Namespace) -> Settings:
    """Calibrate, search, draw and measure; return the rows of `tokdyn bench quality` with those of the plan."""
    rows = list(plan(given))
    config = QualityConfig(
        out=given.work / "quality", count=given.count, batch_size=BATCH, scheduler=SCHEDULER, steps=given.steps,
        guidance=given.guidance, reference=given.reference, extractor=str(given.judge), rounds=given.rounds,
        timed=given.timed, precision="fp32",
    )  # fmt: skip
    stacks = [Stack(name=row["name"], model=str(given.model), methods=row["settings"]) for row in rows]
    files = write_page(config, bench_quality(config, stacks))
    content = by_name(json.loads(files[0].read_text()))
    content["rows"] = [{**row, **found} for row, found in zip(rows, content["rows"], strict=True)]
    return content


def table(content: Settings) -> str:
    """Format the table of the results page: a line for each rule and budget, with a value for each companion."""
    head = ["rule", "computed", "GFLOPs per image", "ms per image", "PSNR, dB", "feature distance", content["quality"]]
    lines: dict[tuple[str, float], dict[str, Settings]] = {}
    for row in content["rows"]:
        lines.setdefault((row["rule"], row["budget"]), {})[row["companion"]] = row
    return markdown.table(
        head,
        (
            [
                rule,
                f"{rows[COMPANIONS[0]]['computed']:.1%}",
                _cell(rows, lambda row: f"{1e3 * row['tflops_per_image']:.1f}"),
                _cell(rows, lambda row: f"{row['milliseconds']:.1f}"),
                _cell(rows, lambda row: "" if row["psnr"] is None else f"{float(row['psnr']):.1f}"),
                _cell(rows, lambda row: "" if row["feature_distance"] is None else f"{row['feature_distance']:.3f}"),
                _cell(rows, lambda row: f"{row['values'][content['quality']]:.2f}"),
            ]
            for (rule, _), rows in lines.items()
        ),
    )


def _cell(rows: Settings, text: Callable[[Settings], str]) -> str:
    """Join the texts of the companions."""
    return " / ".join(text(rows[companion]) for companion in COMPANIONS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, draw and print."""
    parser = command_line.parser(__doc__, "benchmarks/results/cache-pareto.json", rounds=3, figures="docs/results")
    parser.add_argument("model", type=Path, nargs="?", help="run of the recipe cifar10/dit-base")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--count", type=int, default=150, help="images of each stack")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--budgets", default="0.7,0.5", help="shares of computed steps")
    parser.add_argument("--searched", type=int, default=10, help="images to calibrate and to search thresholds on")
    parser.add_argument("--timed", type=int, default=10, help="images of a timed batch")
    parser.add_argument("--work", type=Path, default=Path("runs/cache-pareto"))
    parser.add_argument("--table", type=Path, help="only print and draw an earlier result")
    given = parser.parse_args(argv)
    if given.table:
        content = json.loads(given.table.read_text())
    else:
        if not (given.model and given.reference and given.judge):
            parser.error("give the run of the model, --reference and --judge")
        given.budgets = [float(word) for word in given.budgets.split(",")]
        content = measured(command_line.start(given))
        timing.write(given.out, content)
    print(table(content))
    print(f"The three values are those of the rule {', with '.join(COMPANIONS)}.")
    draw(content, given.figures / "cifar10-cache-pareto.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
