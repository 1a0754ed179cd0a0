"""Compare DC-DiTs on CIFAR-10 that are trained from scratch and upcycled, with and without distillation.

    tokdyn train cifar10/dit-base data.path=cifar10_train.zip out=runs/cifar10/dit-base
    python -m benchmarks.upcycling train runs/cifar10 --data cifar10_train.zip
    python -m benchmarks.upcycling measure runs/cifar10 --held-out cifar10_test.zip --judge cifar10_resnet56.ts

The learning rate is constant after its warm-up, so the checkpoints of a run on half of the base's images also stand for
runs on a quarter and an eighth of them. The first seed trains to the half and is measured at all three; the others end
at an eighth. `train` makes the runs in two processes and continues those that were stopped. `measure` writes the
held-out loss of every run, and the Frechet distance of its images if a judge is given, to
`benchmarks/results/upcycling.json`, draws the curves and prints the table (`table FILE` prints it again).
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

from matplotlib.figure import Figure

from benchmarks import command_line, markdown
from tokdyn import recipe as recipes
from tokdyn.bench import timing
from tokdyn.cost import flops_per_image
from tokdyn.data import DataConfig, open_data
from tokdyn.evaluate import EvalConfig, evaluate
from tokdyn.evaluate.held_out import held_out_loss
from tokdyn.report.style import COLOURS, MARKERS, MUTED, figure_style, save_figure
from tokdyn.sample import SampleConfig, load_model, sample

BATCH = 64
SHARES = (0.125, 0.25, 0.5)
KINDS = {
    "scratch": "from scratch",
    "upcycled": "upcycled, diffusion loss alone",
    "blocks": "upcycled, blocks distilled",
    "predictions": "upcycled, predictions distilled",
    "distilled": "upcycled, blocks and predictions distilled",
    "width": "the same, with dynamic width",
}
MARKS = {
    "scratch": SHARES,
    "upcycled": SHARES,
    "blocks": SHARES[:1],
    "predictions": SHARES[:1],
    "distilled": SHARES,
    "width": SHARES[1:2],
}
DROPS = (0.0, 0.3, 0.6)
CURVE = ("images", "seconds", "loss", "teacher", "output", "natural_kept", "tail_drop")


@dataclass(frozen=True)
class Study:
    """A run of the comparison.

    Attributes:
        kind: One of `KINDS`.
        seed: Seed of weights, data order and noise.
    """

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.seed}"

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the base's images at which the run is measured."""
        return MARKS[self.kind] if self.seed == 0 else MARKS[self.kind][:1]

    def steps(self, share: float, images: int) -> int:
        """Return the optimizer steps at a share of the base's images."""
        return round(images * share / BATCH)

    def words(self, options: argparse.Namespace) -> list[str]:
        """Return the words of the command that trains the run."""
        shortest = self.steps(SHARES[0], options.images)
        settings = [
            f"data.path={options.data}", f"out={options.runs / self.name}", f"seed={self.seed}",
            f"training.images={self.steps(self.shares[-1], options.images) * BATCH}",
            f"training.precision={options.precision}", "training.sample_every=null",
            f"training.checkpoint_every={shortest}", "training.keep_checkpoints=100",
        ]  # fmt: skip
        name = "upcycle/cifar10-width" if self.kind == "width" else "upcycle/cifar10"
        recipe = recipes.load(name, ["data.path=.", "upcycle.base=."])
        assert recipe.upcycle is not None
        assert recipe.chunking is not None
        settings += [  # warm-ups, which do not depend on the length
            f"optimizer.warmup_steps={recipe.optimizer.warmup_steps}",
            f"chunking.budget_warmup_steps={recipe.chunking.budget_warmup_steps}",
        ]
        if self.kind == "scratch":
            return ["train", "cifar10/dcdit-learned", *settings]
        phases = [phase.model_dump(mode="json", exclude_unset=True) for phase in recipe.upcycle.phases]
        if self.kind in ("upcycled", "blocks"):
            phases = [{key: value for key, value in phase.items() if key != "output"} for phase in phases]
        chosen = json.dumps(phases[-1:] if self.kind in ("upcycled", "predictions") else phases)
        return ["train", name, f"upcycle.base={options.base}", f"upcycle.phases={chosen}", *settings]

    def at(self, share: float, options: argparse.Namespace) -> Path:
        """Return the checkpoint at a share of the base's images."""
        return Path(options.runs / self.name / "checkpoints" / f"step_{self.steps(share, options.images):07d}")


def studies(seeds: int) -> Iterator[Study]:
    """Yield the runs, the longest first."""
    for seed in range(seeds):
        for kind in KINDS:
            if seed == 0 or kind != "width":
                yield Study(kind, seed)


def train(options: argparse.Namespace) -> None:
    """Make the runs that are not finished yet."""
    tokdyn = [sys.executable, "-m", "tokdyn.cli.main"]
    threads = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def one(study: Study) -> None:
        folder = options.runs / study.name
        if (folder / "model").is_dir():
            return
        words = study.words(options) + (["--resume"] if (folder / "recipe.yaml").is_file() else [])
        with open(options.runs / f"{study.name}.log", "a", encoding="utf-8") as log:
            subprocess.run([*tokdyn, *words], env=threads, stdout=log, stderr=log, check=True)
        print(f"{study.name} is trained", flush=True)

    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool:
        for _ in pool.map(one, studies(options.seeds)):
            pass


def measure(options: argparse.Namespace) -> None:
    """Measure the base and the runs that exist."""
    command_line.start(options)
    held_out = open_data(DataConfig(kind="images", path=str(options.held_out), size=32, num_classes=10))
    known: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    rows: list[dict[str, Any]] = []
    result = {"machine": timing.machine(), "units": "a multiply-add is 2 FLOPs", "rows": rows}
    places: list[tuple[Study | None, float, Path]] = [(None, 1.0, options.base)]
    places += [(study, share, study.at(share, options)) for study in studies(options.seeds) for share in study.shares]
    for study, share, folder in places:
        if not folder.is_dir():
            continue
        name = study.name if study else "base"
        row = next((row for row in known if row["run"] == name and row["share"] == share), None)
        row = row or _row(study, share, folder, held_out, options)
        if options.judge and "frechet" not in row:
            row["frechet"] = _frechet(f"{name}-{share:g}", folder, options)
        rows.append(row)
        timing.write(options.out, result)
    result["curves"] = {
        folder.name: [
            {key: row[key] for key in CURVE if key in row}
            for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in [options.base, *(options.runs / study.name for study in studies(options.seeds))]
        if folder.is_dir()
    }
    timing.write(options.out, result)
    print(table(rows))
    draw(result, options.figures / "cifar10-upcycling.png")


def _row(study: Study | None, share: float, folder: Path, held_out: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a run, or the base, at a share of the base's images."""
    model, objective, _ = load_model(folder)
    drops = DROPS if study else (0.0,)
    losses = {
        f"{drop:g}": asdict(held_out_loss(model, objective, held_out, images=options.count, tail_drop=drop))
        for drop in drops
    }
    return {
        "run": study.name if study else "base",
        "kind": study.kind if study else "base",
        "share": share,
        "seed": study.seed if study else 0,
        "images": round(share * options.images),
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops_per_forward": flops_per_image(model, losses["0"]["kept"]) / 1e9,
        "held_out": losses,
    }


def _frechet(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the Frechet distance of images sampled at tail drop 0."""
    out = options.work / name
    config = SampleConfig(
        model=str(folder), out=out, format="folder", class_folders=True, count=options.images_to_judge, batch_size=100,
        scheduler="dpm", steps=20, precision="fp32",
    )  # fmt: skip
    budget = sample(config).budgets[0]
    cache = options.work / "reference.safetensors"
    result = evaluate(EvalConfig(generated=out, reference=options.held_out, extractor=str(options.judge), cache=cache))
    return {"values": result.values, "spread": result.spread, "tflops_per_image": budget.tflops_per_image}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of the results page in Markdown, sorted by kind, images and seed."""
    kinds = ["base", *KINDS]
    rows = sorted(rows, key=lambda row: (kinds.index(row["kind"]), row["images"], row["seed"]))
    judged = any("frechet" in row for row in rows)
    head = ["model", "images", "seed", "held-out loss at tail drop 0", "0.3", "0.6", "kept", "GFLOPs"]
    lines = []
    for row in rows:
        losses = [f"{each['loss']:.4f}" for each in row["held_out"].values()]
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
                f"{row['gflops_per_forward']:.2f}",
                *(["" if distance is None else f"{distance:.2f}"] * judged),
            ]
        )
    return markdown.table(head + ["frechet_distance"] * judged, lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the training loss of every run over its images, and the held-out losses."""
    with figure_style(column=True):
        figure = Figure(figsize=(3.4, 5.2), layout="constrained")
        trained, scored = figure.subplots(2, 1)
        for kind, colour, marker in zip(KINDS, COLOURS, MARKERS, strict=False):
            for name, curve in result["curves"].items():
                if name.startswith(kind):
                    images, losses = ([row[key] for row in curve if row["loss"] < 0.2] for key in ("images", "loss"))
                    label = KINDS[kind] if name.endswith("-0") else None
                    trained.plot(images, losses, color=colour, linewidth=1.0, label=label)
            rows = [row for row in result["rows"] if row["kind"] == kind]
            losses = [row["held_out"]["0"]["loss"] for row in rows]
            first = [(row["images"], loss) for row, loss in zip(rows, losses, strict=True) if row["seed"] == 0]
            scored.plot(*zip(*first, strict=True), color=colour, linewidth=1.0)
            scored.scatter(
                [row["images"] for row in rows], losses, color=colour, marker=marker, s=16, label=KINDS[kind]
            )
        for row in result["rows"]:
            if row["kind"] == "base":
                label = f"DiT, the base, {row['images']:,} images"
                scored.axhline(row["held_out"]["0"]["loss"], color=MUTED, linestyle=":", label=label)
        trained.set_title("while training, tail drops drawn")
        scored.set_title("held out, no tail drop")
        for axes in (trained, scored):
            axes.set_xlabel("images, thousands")
            axes.set_ylabel("diffusion loss")
            axes.xaxis.set_major_formatter(lambda images, _: f"{images / 1e3:g}")
        figure.legend(*scored.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
        save_figure(figure, path)


def main() -> None:
    """Train the runs, measure them, or print the table."""
    parser = command_line.parser(__doc__, "benchmarks/results/upcycling.json", figures="docs/results")
    parser.add_argument("what", choices=("train", "measure", "table"))
    parser.add_argument("runs", type=Path, help="folder of the runs; for table, the JSON file of an earlier result")
    parser.add_argument("--base", type=Path, help="folder of the base's run; RUNS/dit-base by default")
    parser.add_argument("--data", type=Path, help="training images")
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--images", type=int, default=256000, help="images that the base was trained on")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the runs on an eighth of the images")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=5000, help="images for the held-out loss")
    parser.add_argument("--images-to-judge", type=int, default=5000)
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling-samples"))
    options = parser.parse_args()
    options.base = options.base or options.runs / "dit-base"
    if options.what == "table":
        print(table(json.loads(options.runs.read_text())["rows"]))
        return
    needed = "data" if options.what == "train" else "held_out"
    if getattr(options, needed) is None:
        parser.error(f"{options.what} needs --{needed.replace('_', '-')}")
    {"train": train, "measure": measure}[options.what](options)


if __name__ == "__main__":
    main()
