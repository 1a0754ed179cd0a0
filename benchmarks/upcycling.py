"""The upcycling study on CIFAR-10: DC-DiT from scratch against upcycled ones, with and without distillation.

    tokdyn train cifar10/dit-base data.path=cifar10_train.zip out=runs/cifar10/dit-base
    python -m benchmarks.upcycling train runs/cifar10 --data cifar10_train.zip
    python -m benchmarks.upcycling measure runs/cifar10 --held-out cifar10_test.zip --judge cifar10_resnet56.ts

The learning rate stays where it is after its warm-up, so a run at half of the base's images is also the runs at a
quarter and an eighth of them: the first seed goes on to the half and is measured on the way, the others end at an
eighth. `train` makes the runs one after the other in each of two processes, and continues those that were stopped;
`measure` writes the held-out loss of every run, and the Frechet distance of its images where a judge is given, to
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

from benchmarks import markdown
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
    """One run.

    Attributes:
        kind: of `KINDS`.
        seed: of weights, data order and noise.
    """

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-{self.seed}"

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the base's images, at which it is measured."""
        return MARKS[self.kind] if self.seed == 0 else MARKS[self.kind][:1]

    def steps(self, share: float, images: int) -> int:
        """Optimizer steps at a share of the base's images."""
        return round(images * share / BATCH)

    def words(self, given: argparse.Namespace) -> list[str]:
        """The command that trains it."""
        shortest = self.steps(SHARES[0], given.images)
        settings = [
            f"data.path={given.data}", f"out={given.runs / self.name}", f"seed={self.seed}",
            f"training.images={self.steps(self.shares[-1], given.images) * BATCH}",
            f"training.precision={given.precision}", "training.sample_every=null",
            f"training.checkpoint_every={shortest}", "training.keep_checkpoints=100",
        ]  # fmt: skip
        name = "upcycle/cifar10-width" if self.kind == "width" else "upcycle/cifar10"
        recipe = recipes.load(name, ["data.path=.", "upcycle.base=."])
        assert recipe.upcycle is not None
        assert recipe.chunking is not None
        settings += [  # the same at every length
            f"optimizer.warmup_steps={recipe.optimizer.warmup_steps}",
            f"chunking.budget_warmup_steps={recipe.chunking.budget_warmup_steps}",
        ]
        if self.kind == "scratch":
            return ["train", "cifar10/dcdit-learned", *settings]
        phases = [phase.model_dump(mode="json", exclude_unset=True) for phase in recipe.upcycle.phases]
        if self.kind in ("upcycled", "blocks"):
            phases = [{key: value for key, value in phase.items() if key != "output"} for phase in phases]
        chosen = json.dumps(phases[-1:] if self.kind in ("upcycled", "predictions") else phases)
        return ["train", name, f"upcycle.base={given.base}", f"upcycle.phases={chosen}", *settings]

    def at(self, share: float, given: argparse.Namespace) -> Path:
        """The checkpoint at a share of the base's images."""
        return Path(given.runs / self.name / "checkpoints" / f"step_{self.steps(share, given.images):07d}")


def studies(seeds: int) -> Iterator[Study]:
    """The runs, the longest first."""
    for seed in range(seeds):
        for kind in KINDS:
            if seed == 0 or kind != "width":
                yield Study(kind, seed)


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
    held_out = open_data(DataConfig(kind="images", path=str(given.held_out), size=32, num_classes=10))
    known: list[dict[str, Any]] = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    rows: list[dict[str, Any]] = []
    result = {"machine": timing.machine(), "units": "a multiply-add is 2 FLOPs", "rows": rows}
    places: list[tuple[Study | None, float, Path]] = [(None, 1.0, given.base)]
    places += [(study, share, study.at(share, given)) for study in studies(given.seeds) for share in study.shares]
    for study, share, folder in places:
        if not folder.is_dir():
            continue
        name = study.name if study else "base"
        row = next((row for row in known if row["run"] == name and row["share"] == share), None)
        row = row or _row(study, share, folder, held_out, given)
        if given.judge and "frechet" not in row:
            row["frechet"] = _frechet(f"{name}-{share:g}", folder, given)
        rows.append(row)
        timing.write(given.out, result)
    result["curves"] = {
        folder.name: [
            {key: row[key] for key in CURVE if key in row}
            for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in [given.base, *(given.runs / study.name for study in studies(given.seeds))]
        if folder.is_dir()
    }
    timing.write(given.out, result)
    print(table(rows))
    draw(result, given.figures / "cifar10-upcycling.png")


def _row(study: Study | None, share: float, folder: Path, held_out: Any, given: argparse.Namespace) -> dict[str, Any]:
    model, objective, _ = load_model(folder)
    drops = DROPS if study else (0.0,)
    losses = {
        f"{drop:g}": asdict(held_out_loss(model, objective, held_out, images=given.count, tail_drop=drop))
        for drop in drops
    }
    return {
        "run": study.name if study else "base",
        "kind": study.kind if study else "base",
        "share": share,
        "seed": study.seed if study else 0,
        "images": round(share * given.images),
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops_per_forward": flops_per_image(model, losses["0"]["kept"]) / 1e9,
        "held_out": losses,
    }


def _frechet(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Frechet distance of sampled images at tail drop 0."""
    out = given.work / name
    config = SampleConfig(
        model=str(folder), out=out, format="folder", class_folders=True, count=given.images_to_judge, batch_size=100,
        scheduler="dpm", steps=20, precision="fp32",
    )  # fmt: skip
    budget = sample(config).budgets[0]
    cache = given.work / "reference.safetensors"
    result = evaluate(EvalConfig(generated=out, reference=given.held_out, extractor=str(given.judge), cache=cache))
    return {"values": result.values, "spread": result.spread, "tflops_per_image": budget.tflops_per_image}


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the results page, in Markdown: by kind, then images, then seed."""
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
    """Training loss over the images of every run, and the held-out loss where it was measured."""
    with figure_style():
        figure = Figure(figsize=(9.0, 4.4), layout="constrained")
        trained, scored = figure.subplots(1, 2)
        for kind, colour, marker in zip(KINDS, COLOURS, MARKERS, strict=False):
            for name, curve in result["curves"].items():
                if name.startswith(kind):
                    images, losses = ([row[key] for row in curve if row["loss"] < 0.2] for key in ("images", "loss"))
                    label = KINDS[kind] if name.endswith("-0") else None
                    trained.plot(images, losses, color=colour, linewidth=1.2, label=label)
            rows = [row for row in result["rows"] if row["kind"] == kind]
            losses = [row["held_out"]["0"]["loss"] for row in rows]
            first = [(row["images"], loss) for row, loss in zip(rows, losses, strict=True) if row["seed"] == 0]
            scored.plot(*zip(*first, strict=True), color=colour, linewidth=1.2)
            scored.scatter([row["images"] for row in rows], losses, color=colour, marker=marker, label=KINDS[kind])
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
        figure.legend(*scored.get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8.5)
        save_figure(figure, path)


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
    parser.add_argument("--seeds", type=int, default=2, help="of the runs to an eighth")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=5000, help="held-out images for the loss")
    parser.add_argument("--images-to-judge", type=int, default=5000)
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling-samples"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upcycling.json"))
    parser.add_argument("--figures", type=Path, default=Path("docs/results"))
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
