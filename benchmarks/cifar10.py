"""The CIFAR-10 comparison: four models trained on equally many images, sampled at several budgets.

Train the four recipes first (each resumes with --resume), for example

    tokdyn train cifar10/dcdit-learned data.path=cifar10_train.zip out=runs/dcdit-learned

then

    python -m benchmarks.cifar10 runs --reference cifar10_test.zip --judge cifar10_resnet56.ts

One network judges the images of all models. A stopped command can be repeated; runs that were trained further are
measured again. Writes `benchmarks/results/cifar10.json` and the pictures of the results page, and prints its table
(`--table FILE` prints it again from the JSON).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import command_line, markdown
from tokdyn.bench import timing
from tokdyn.cost import flops_per_image
from tokdyn.evaluate import EvalConfig, EvalResult, evaluate
from tokdyn.models import DCDiT
from tokdyn.report.pareto import draw_pareto, read_points
from tokdyn.sample import SampleConfig, load_model, sample

RUNS = {
    "dit-params": "DiT P=4, same parameters",
    "dit-flops": "DiT P=4, same FLOPs",
    "dcdit-learned": "DC-DiT N=4, learned router",
    "dcdit-random": "DC-DiT N=4, random router",
}
DROPS = (0.0, 0.3, 0.6)


def training(run: Path) -> dict[str, Any]:
    """Summarise the training of a run from its log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-10:]
    kept = [row["natural_kept"] for row in last if "natural_kept" in row]
    return {
        "images": rows[-1]["images"],
        "steps": rows[-1]["step"],
        "seconds": rows[-1]["seconds"],
        "loss_last_500_steps": sum(row["loss"] for row in last) / len(last),
        "natural_kept_last_500_steps": sum(kept) / len(kept) if kept else None,
    }


def measure(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Sample a run at every budget and judge the images."""
    run, out = given.runs / name, given.work / name
    model, _, info = load_model(run)
    drops = DROPS if isinstance(model, DCDiT) else (0.0,)
    config = SampleConfig(
        model=str(run),
        out=out,
        format="folder",
        class_folders=True,
        count=given.count,
        batch_size=given.batch,
        scheduler="dpm",
        steps=given.steps,
        guidance=given.guidance,
        tail_drop=drops,
        precision="bf16",
    )
    rows = []
    for budget in sample(config).budgets:
        folder = out / f"tail_drop_{budget.tail_drop:g}" if len(drops) > 1 else out
        result: EvalResult = evaluate(
            EvalConfig(
                generated=folder,
                reference=given.reference,
                extractor=str(given.judge),
                cache=given.work / "reference.safetensors",
            )
        )
        rows.append(
            {
                "run": name,
                "model": RUNS[name],
                "label": f"drop {budget.tail_drop:g}" if len(drops) > 1 else "",
                "tail_drop": budget.tail_drop,
                "parameters": sum(p.numel() for p in model.parameters()),
                "gflops_per_forward_dense_kept": flops_per_image(model) / 1e9,
                "kept": budget.kept,
                "gflops_per_image": budget.tflops_per_image * 1e3 if budget.tflops_per_image else None,
                "images": budget.images,
                "values": result.values,
                "spread": result.spread,
                "reference_values": result.reference_values,
                "training": training(run),
                "step": info.step,
                "extractor": result.extractor.model_dump(mode="json"),
            }
        )
        print(json.dumps({key: rows[-1][key] for key in ("run", "tail_drop", "kept", "gflops_per_image", "values")}))
    return rows


def pictures(name: str, given: argparse.Namespace) -> None:
    """Draw the same 20 images with a run at every budget, and the tokens that its router keeps."""
    out = given.work / "pictures" / name
    config = SampleConfig(
        model=str(given.runs / name),
        out=out,
        count=20,
        columns=10,
        scheduler="dpm",
        steps=given.steps,
        guidance=given.guidance,
        tail_drop=DROPS if name == "dcdit-learned" else (0.0,),
        maps=name.startswith("dcdit"),
    )
    sample(config)
    for picture in sorted(out.rglob("*.png")):
        parts = picture.relative_to(given.work / "pictures").with_suffix("").parts
        shutil.copyfile(picture, given.figures / f"cifar10-{'-'.join(parts)}.png")


def table(result: dict[str, Any]) -> str:
    """Format the table of the results page."""
    rows = result["rows"]
    judge = rows[0]["extractor"]["name"]
    head = ["model", "parameters", "tail drop", "kept", "GFLOPs per image", f"frechet_distance[{judge}]"]
    lines = []
    for row in rows:
        values = {key.split("[")[0]: value for key, value in row["values"].items()}
        lines.append(
            [
                row["model"],
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['tail_drop']:g}" if row["kept"] else "",
                f"{row['kept']:.1%}" if row["kept"] else "",
                f"{row['gflops_per_image']:.1f}",
                f"{values['frechet_distance']:.2f}",
                f"{values['class_score']:.2f}",
            ]
        )
    return markdown.table([*head, f"class_score[{judge}]"], lines)


def main() -> None:
    """Measure the finished runs and draw."""
    parser = command_line.parser(__doc__, "benchmarks/results/cifar10.json", figures="docs/results")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=Path("runs/cifar10-samples"))
    parser.add_argument("--table", type=Path, help="only print the table of an earlier result")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return
    if not (given.runs and given.reference and given.judge):
        parser.error("give the folder of the runs, --reference and --judge")
    command_line.start(given)
    given.figures.mkdir(parents=True, exist_ok=True)
    settings = {"count": given.count, "scheduler": "dpm", "steps": given.steps, "guidance": given.guidance, "seed": 0}
    units = "a multiply-add is 2 FLOPs; gflops_per_image sums all steps and guidance branches"
    result: dict[str, Any] = {"machine": timing.machine(), "sampling": settings, "units": units, "rows": []}
    earlier: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"sampling": None}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS if (given.runs / name / "model").is_dir()}
    if not measured:
        parser.error(f"{given.runs} holds no finished run; expected folders named {', '.join(RUNS)}")
    if earlier["sampling"] == settings:
        measured |= {name: [row for row in earlier["rows"] if row["run"] == name] for name in measured}
    for name, before in measured.items():
        if not before or before[0]["training"] != training(given.runs / name):
            measured[name] = measure(name, given)
        result["rows"] = [row for rows in measured.values() for row in rows]
        timing.write(given.out, result)
    rows = result["rows"]
    print(table(result))
    judge = next(key for key in rows[0]["values"] if key.startswith("frechet_distance"))
    points = read_points(given.out, "gflops_per_image", f"values.{judge}")
    draw_pareto(points, given.figures / "cifar10-pareto.png", "GFLOPs per image", judge, column=True)
    for name in dict.fromkeys(row["run"] for row in rows):
        pictures(name, given)


if __name__ == "__main__":
    main()
