"""Tuned schedules against uniform ones at several budgets, on a trained DC-DiT.

    tokdyn train cifar10/dcdit-learned data.path=cifar10_train.zip out=runs/cifar10/dcdit training.images=48000
    python -m benchmarks.tuning runs/cifar10/dcdit --extractor cifar10_resnet56.ts --work runs/tuned

Calls `tokdyn tune` for every budget whose folder does not exist yet, writes the measurements to
`benchmarks/results/tuning.json` and prints the table. Exits with 1 unless the tuned schedule is closer to the
unmodified model than the uniform one at every budget, within the same FLOPs. Distances are in the features of the
extractor, image by image, from seeds that the search did not use.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import command_line, markdown
from tokdyn.bench import timing

COLUMNS = ("name", "methods", "kept", "tflops_per_image", "flops_saved", "psnr", "ssim", "feature_distance")


def tune(given: argparse.Namespace, budget: float) -> Path:
    """Tune for a budget unless that is done, and return the folder."""
    out = Path(given.work / f"{budget:g}")
    settings = {
        "model": str(given.model), "flops": f"{budget:g}", "steps": str(given.steps), "guidance": "1.5",
        "scheduler": "dpm", "precision": "fp32", "extractor": str(given.extractor), "out": str(out),
        **{word.partition("=")[0]: word.partition("=")[2] for word in given.settings},
    }  # fmt: skip
    if (out / "tuned.json").exists():
        before = json.loads((out / "tuned.json").read_text())["settings"]
        changed = [f"{name}={value}" for name, value in settings.items() if str(before.get(name)) != value]
        if changed:
            sys.exit(f"{out} was not tuned with {' '.join(changed)}; choose another --work, or delete it.")
    else:
        words = [f"{name}={value}" for name, value in settings.items() if name != "model"]
        code = subprocess.run([sys.executable, "-m", "tokdyn.cli.main", "tune", str(given.model), *words]).returncode
        if code:  # the command has printed the reason
            sys.exit(code)
    return out


def collect(folder: Path, budget: float) -> dict[str, Any]:
    """Collect the measurements of the uniform schedule and of the tuned ones, the best of these first."""
    quality = json.loads((folder / "quality.json").read_text())
    rows = [{key: row[key] for key in COLUMNS} for row in quality["rows"]]
    tuned = sorted((row for row in rows if row["name"].startswith("tuned")), key=lambda row: row["feature_distance"])
    (uniform,) = (row for row in rows if row["name"] == "uniform")
    winner = json.loads((folder / "tuned.json").read_text())["winner"]
    schedule = {key: winner.get(key) for key in ("methods", "tail_drop", "uncond_tail_drop")}
    return {
        "budget": budget, "machine": quality["machine"], "images": quality["settings"]["count"], "plain": rows[0],
        "uniform": uniform, "tuned": tuned, "schedule": schedule, "met": beats(tuned[0], uniform, rows[0]),
    }  # fmt: skip


def beats(tuned: dict[str, Any], uniform: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether a schedule is closer at the same FLOPs, give or take 0.5% of the whole for other images."""
    nearer = tuned["feature_distance"] < uniform["feature_distance"] and tuned["psnr"] > uniform["psnr"]
    more = tuned["tflops_per_image"] - uniform["tflops_per_image"]
    return bool(nearer and more <= 0.005 * plain["tflops_per_image"])


def table(budgets: list[dict[str, Any]]) -> str:
    """Format the table of the results page."""
    head = ["FLOPs asked for", "schedule", "GFLOPs per image", "kept", "PSNR, dB", "SSIM", "feature distance"]
    lines = []
    for each in budgets:
        for name, row in (("uniform", each["uniform"]), ("tuned", each["tuned"][0])):
            lines.append([
                f"{each['budget']:.0%}", name, f"{1e3 * row['tflops_per_image']:.1f}", f"{row['kept']:.1%}",
                f"{row['psnr']:.1f}", f"{row['ssim']:.3f}", f"{row['feature_distance']:.3f}",
            ])  # fmt: skip
    return markdown.table(head, lines)


def main() -> int:
    """Tune, collect and print."""
    parser = command_line.parser(__doc__, "benchmarks/results/tuning.json")
    parser.add_argument("model", type=Path)
    parser.add_argument("settings", nargs="*", help="more settings of tokdyn tune, such as count=512")
    parser.add_argument("--extractor", type=Path, required=True, help="judge network")
    parser.add_argument("--budgets", default="0.8,0.65,0.5")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("runs/tuned"))
    given = parser.parse_intermixed_args()
    budgets = [collect(tune(given, each), each) for each in map(float, given.budgets.split(","))]
    print(table(budgets))
    timing.write(given.out, {"model": given.model.name, "units": "a multiply-add is 2 FLOPs", "budgets": budgets})
    return command_line.finish([f"budget {each['budget']:g}" for each in budgets if not each["met"]])


if __name__ == "__main__":
    sys.exit(main())
