"""The upcycling study on CIFAR-10: DC-DiT from scratch against upcycled ones, with and without distillation.

    tokdyn train cifar10/dit-base data.path=cifar10_train.zip out=runs/cifar10/dit-base
    python -m benchmarks.upcycling train runs/cifar10 --data cifar10_train.zip
    python -m benchmarks.upcycling measure runs/cifar10 --held-out cifar10_test.zip --judge cifar10_resnet56.ts

`train` makes the runs one after the other in each of two processes, and continues those that were stopped; `measure`
writes the held-out loss of every run, and the Frechet distance of its images where a judge is given, to
`benchmarks/results/upcycling.json`, and prints the table (`table FILE` prints it again).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing
from tokdyn.data import DataConfig, open_data
from tokdyn.evaluate import EvalConfig, evaluate
from tokdyn.evaluate.held_out import held_out_loss
from tokdyn.flops import flops_per_image
from tokdyn.sample import SampleConfig, load_model, sample

BATCH = 64
SHARES = (0.125, 0.25, 0.5)
KINDS = {"scratch": "from scratch", "upcycled": "upcycled", "distilled": "upcycled, distilled"}
DROPS = (0.0, 0.3, 0.6)


@dataclass(frozen=True)
class Study:
    """One run.

    Attributes:
        kind: of `KINDS`.
        share: of the base's images.
        seed: of weights, data order and noise.
    """

    kind: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.share:g}-{self.seed}"

    def words(self, given: argparse.Namespace) -> list[str]:
        """The command that trains it."""
        steps = round(given.images * self.share / BATCH)
        distil, handover = steps // 5, steps // 20
        warmup = distil + handover  # steps without tail drop, the same for all kinds
        settings = [
            f"data.path={given.data}", f"out={given.runs / self.name}", f"seed={self.seed}",
            f"training.images={steps * BATCH}", f"training.precision={given.precision}", "training.sample_every=null",
            f"optimizer.warmup_steps={max(20, steps // 20)}", f"chunking.budget_warmup_steps={warmup}",
        ]  # fmt: skip
        if self.kind == "scratch":
            return ["train", "cifar10/dcdit-learned", *settings]
        phases: list[dict[str, Any]] = [{"name": "finetune"}]
        if self.kind == "distilled":
            phases = [
                {"name": "distill", "steps": distil, "plan": "fixed", "teacher": 1.0},
                {"name": "handover", "steps": handover, "plan": "handover", "teacher": 1.0},
                *phases,
            ]
        return [
            "train",
            "upcycle/cifar10",
            f"upcycle.base={given.base}",
            f"upcycle.phases={json.dumps(phases)}",
            *settings,
        ]


def studies(seeds: int) -> Iterator[Study]:
    """The runs, the shortest first; several seeds of these."""
    for share in SHARES:
        for seed in range(seeds if share == SHARES[0] else 1):
            for kind in KINDS:
                yield Study(kind, share, seed)


def train(given: argparse.Namespace) -> None:
    """Make the runs that are not there yet."""
    tokdyn = [sys.executable, "-m", "tokdyn.cli.main"]
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def one(study: Study) -> None:
        folder = given.runs / study.name
        if (folder / "model").is_dir():
            return
        words = study.words(given) + (["--resume"] if (folder / "recipe.yaml").is_file() else [])
        with open(given.runs / f"{study.name}.log", "a", encoding="utf-8") as log:
            subprocess.run([*tokdyn, *words], env=threads, stdout=log, stderr=log, check=True)
        print(f"{study.name} is trained", flush=True)

    given.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.workers) as pool:
        for _ in pool.map(one, studies(given.seeds)):
            pass


def measure(given: argparse.Namespace) -> None:
    """Measure the runs that are there, and the base."""
    timing.prepare(given.threads)
    held_out = open_data(DataConfig(kind="images", path=given.held_out, size=32, num_classes=10))
    known: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    rows = []
    places = [(None, given.base), *((study, given.runs / study.name) for study in studies(given.seeds))]
    for study, folder in places:
        if not (folder / "model").is_dir():
            continue
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        row = next((row for row in known if row["run"] == folder.name and row["images"] == log[-1]["images"]), None)
        row = row or _row(study, folder, log, held_out, given)
        if given.judge and "frechet" not in row:
            row["frechet"] = _frechet(folder, given)
        rows.append(row)
        timing.write(given.out, {"machine": timing.machine(), "units": "a multiply-add is 2 FLOPs", "rows": rows})
    print(table(rows))


def _row(
    study: Study | None, folder: Path, log: list[dict[str, Any]], held_out: Any, given: argparse.Namespace
) -> dict[str, Any]:
    model, objective, _ = load_model(folder)
    drops = DROPS if study else (0.0,)
    losses = {
        f"{drop:g}": asdict(held_out_loss(model, objective, held_out, images=given.count, tail_drop=drop))
        for drop in drops
    }
    curve = [{key: row[key] for key in ("images", "loss", "teacher", "natural_kept") if key in row} for row in log[::4]]
    return {
        "run": folder.name,
        "kind": study.kind if study else "base",
        "share": study.share if study else 1.0,
        "seed": study.seed if study else 0,
        "images": log[-1]["images"],
        "seconds": log[-1]["seconds"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops_per_forward": flops_per_image(model, losses["0"]["kept"]) / 1e9,
        "held_out": losses,
        "curve": curve,
    }


def _frechet(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Frechet distance of sampled images at tail drop 0."""
    out = given.work / folder.name
    config = SampleConfig(
        model=str(folder), out=out, format="folder", class_folders=True, count=given.images_to_judge, batch_size=100,
        scheduler="dpm", steps=20, precision="fp32",
    )  # fmt: skip
    budget = sample(config).budgets[0]
    cache = given.work / "reference.safetensors"
    result = evaluate(EvalConfig(generated=out, reference=given.held_out, extractor=str(given.judge), cache=cache))
    return {"values": result.values, "spread": result.spread, "tflops_per_image": budget.tflops_per_image}


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the results page, in Markdown."""
    lines = [
        ["model", "images", "seed", "held-out loss at tail drop 0", "0.3", "0.6", "kept", "frechet_distance"],
        ["---"] * 8,
    ]
    for row in rows:
        losses = [f"{each['loss']:.5f}" for each in row["held_out"].values()]
        kept = row["held_out"]["0"]["kept"]
        values = {key.split("[")[0]: value for key, value in row.get("frechet", {}).get("values", {}).items()}
        distance = values.get("frechet_distance")
        lines.append(
            [
                KINDS.get(row["kind"], "DiT, the base"),
                f"{row['images']:,}",
                str(row["seed"]),
                *(losses + [""] * 2)[:3],
                "" if kept is None else f"{kept:.1%}",
                "" if distance is None else f"{distance:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Train, measure or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "table"))
    parser.add_argument("runs", type=Path, help="folder of the runs; the JSON of an earlier result for table")
    parser.add_argument("--base", type=Path, help="run of the base; RUNS/dit-base by default")
    parser.add_argument("--data", type=Path, help="training images")
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--images", type=int, default=256000, help="of the base; the others get shares of it")
    parser.add_argument("--seeds", type=int, default=2, help="of the shortest runs")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=5000, help="held-out images for the loss")
    parser.add_argument("--images-to-judge", type=int, default=5000)
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling-samples"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upcycling.json"))
    parser.add_argument("--threads", type=int, help="processor threads; all by default")
    given = parser.parse_args()
    given.base = given.base or given.runs / "dit-base"
    if given.what == "table":
        print(table(json.loads(given.runs.read_text())["rows"]))
        return
    needed = "data" if given.what == "train" else "held_out"
    if getattr(given, needed) is None:
        parser.error(f"{given.what} needs --{needed.replace('_', '-')}")
    {"train": train, "measure": measure}[given.what](given)


if __name__ == "__main__":
    main()
