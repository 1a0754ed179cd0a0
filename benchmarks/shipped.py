"""Measure the small models that ship with the package: are their images recognised, and is the router on the detail?

    python -m benchmarks.shipped                                    # those in the package
    python -m benchmarks.shipped --dit runs/dit --dc-dit runs/dc    # or others, such as runs that are still training

A classifier is trained on the procedural shapes first, and has to recognise 99% of images that nobody was trained on.
It then judges 500 images of each model, those of the DC-DiT at three budgets. The boundary probabilities of the router
are compared with the true detail of noisy images, beside those of a random router and the largest area under the ROC
curve that tokens of this size can have. Writes `benchmarks/results/shipped.json` and pictures, and prints the tables of
the results page (`--table FILE` prints them again).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import command_line, markdown
from benchmarks.shape_judge import UNSEEN, ShapeJudge, accuracy, score_judge, summary, train_judge
from tokdyn.bases.locating import locate
from tokdyn.bench import timing
from tokdyn.data import ShapesDataset, detail_area, detail_shares
from tokdyn.demo.pictures import draw_router
from tokdyn.demo.router import score_router
from tokdyn.files import json_object
from tokdyn.report.grids import image_grid
from tokdyn.report.pixels import Pixels, write_png
from tokdyn.sample import SampleConfig, load_model
from tokdyn.sample.costs import mean_kept, merge_costs, step_costs
from tokdyn.sample.drawing import draw
from tokdyn.sample.job import Job, prepare

DROPS = (0.0, 0.3, 0.6)
LEVELS = (0.1, 0.3, 0.5)
JUDGE = 0.99  # accuracy of the judge on real images
BARS = {0.0: 0.95, 0.3: 0.95, 0.6: 0.90}
"""Accuracy on generated images that is asked for, by tail drop."""
_SIDE_BY_SIDE = 10  # images of each row of the picture, one of each class
SCORED = 512  # images that the router is scored on


def settings_of(model: str, given: argparse.Namespace) -> dict[str, float]:
    """Return steps and guidance: those of the command line, or those recorded with a model, or 25 and 3."""
    recorded: dict[str, Any] = {}
    if not Path(model).exists():
        path, _ = locate(model)
        recorded = json_object(path / "tokdyn.json").get("sampling", {})
    chosen = {"steps": given.steps, "guidance": given.guidance}
    return {name: value or recorded.get(name, {"steps": 25, "guidance": 3.0}[name]) for name, value in chosen.items()}


def measure(
    job: Job, drop: float, judge: ShapeJudge, batch: int, names: tuple[str, ...]
) -> tuple[dict[str, Any], Pixels]:
    """Draw the images of a job with one tail drop and judge them; return the row and the first images."""
    images: list[Pixels] = []
    costs: Any = ()
    count, began = job.config.count, time.perf_counter()
    for start in range(0, count, batch):
        indices = range(start, min(start + batch, count))
        pixels, records = draw(job, job.config.sampler(drop, job.clip), indices, None)
        costs = merge_costs(costs, start, step_costs(job.model, records, len(indices)), len(indices))
        images.append(pixels)
    seconds = time.perf_counter() - began
    whole = np.concatenate(images)
    labels = torch.tensor(job.labels)
    real = torch.from_numpy(whole).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    row = {
        "model": job.config.model,
        "class": type(job.model).__name__,
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "tail_drop": drop,
        "images": count,
        **summary(accuracy(judge, real, labels), labels, names),
        "kept": mean_kept(costs),
        "gflops_per_image": sum(cost.gflops for cost in costs),
        "seconds": seconds,
    }
    return row, whole[:_SIDE_BY_SIDE]


def router_rows(model: str, data: ShapesDataset) -> list[dict[str, Any]]:
    """Score the router of a DC-DiT at each noise level, beside a random one."""
    loaded, objective, _ = load_model(model)
    unseen = range(UNSEEN, UNSEEN + SCORED)
    side = loaded.config.sample_size // loaded.config.patch_size
    masks, grid = data.detail_masks(unseen), (side, side)
    guess = torch.rand(detail_shares(grid, masks).shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for level in LEVELS:
        score = score_router(loaded, objective, data, unseen, level)
        rows.append(
            {
                "level": level,
                "area": score.area,
                "random_area": detail_area(guess, grid, masks),
                "oracle_area": score.best_area,
                "kept": score.detail.kept,
                "detail_kept": score.detail.recall,
                "oracle_detail_kept": score.detail.best,
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """Format the table of the images."""
    head = ["model", "parameters", "tail drop", "kept", "GFLOPs per image", "recognised", "worst class"]
    lines = []
    for row in result["rows"]:
        worst = min(row["per_class"], key=row["per_class"].get)
        chunks = row["class"] == "DCDiT"
        lines.append(
            [
                row["model"],
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['tail_drop']:g}" if chunks else "",
                f"{row['kept']:.1%}" if chunks else "",
                f"{row['gflops_per_image']:.2f}",
                f"{row['accuracy']:.1%}",
                f"{worst}, {row['per_class'][worst]:.0%}",
            ]
        )
    return markdown.table(head, lines)


def router_table(result: dict[str, Any]) -> str:
    """Format the table of the router."""
    head = ["noise level", "ROC area", "random router", "largest possible", "kept", "detail kept", "largest possible"]
    lines = [
        [
            f"{row['level']:g}",
            *(f"{row[name]:.3f}" for name in ("area", "random_area", "oracle_area")),
            *(f"{row[name]:.1%}" for name in ("kept", "detail_kept", "oracle_detail_kept")),
        ]
        for row in result["router"]
    ]
    return markdown.table(head, lines)


def missed(result: dict[str, Any]) -> list[str]:
    """List the bars that are missed."""
    found = []
    if result["judge"]["accuracy"] < JUDGE:
        found.append(f"the judge recognises {result['judge']['accuracy']:.1%} of real images, {JUDGE:.0%} wanted")
    for row in result["rows"]:
        bar = BARS[row["tail_drop"]]
        if row["accuracy"] < bar:
            found.append(f"{row['model']} at tail drop {row['tail_drop']:g}: {row['accuracy']:.1%} of {bar:.0%}")
    return found


def draw_pictures(shown: dict[str, Pixels], names: tuple[str, ...], dc_dit: str, figures: Path) -> None:
    """Draw ten images of each model and budget, and the cells that the router keeps."""
    columns = len(next(iter(shown.values())))
    page = image_grid(
        np.concatenate(list(shown.values())), columns, row_titles=list(shown), column_titles=names[:columns]
    )
    write_png(page, figures / "shipped-samples.png")
    model, objective, _ = load_model(dc_dit)
    data = ShapesDataset((32, 32))
    draw_router(model, objective, data, range(UNSEEN, UNSEEN + 6), LEVELS, figures / "shipped-router.png")


def main() -> int:
    """Measure and draw."""
    parser = command_line.parser(__doc__, "benchmarks/results/shipped.json", figures="docs/results")
    parser.add_argument("--dit", default="shapes/dit", help="name or run of the DiT")
    parser.add_argument("--dc-dit", default="shapes/dc-dit", help="name or run of the DC-DiT")
    parser.add_argument("--count", type=int, default=500, help="images of each model and budget")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, help="sampling steps; those recorded with the model by default")
    parser.add_argument("--guidance", type=float, help="scale of guidance, likewise")
    parser.add_argument("--judge-steps", type=int, default=900, help="training steps of the classifier")
    parser.add_argument("--table", type=Path, help="only print the tables of an earlier result")
    given = parser.parse_args()
    if given.table:
        earlier = json.loads(given.table.read_text())
        print(f"{table(earlier)}\n\n{router_table(earlier)}")
        return 0
    command_line.start(given)
    data = ShapesDataset((32, 32))
    began = time.perf_counter()
    judge = train_judge(data, given.judge_steps)
    judged = {"accuracy": score_judge(judge, data), "seconds": time.perf_counter() - began, "steps": given.judge_steps}
    print(f"the judge recognises {judged['accuracy']:.2%} of unseen images after {judged['seconds']:.0f} s", flush=True)
    result: dict[str, Any] = {"machine": timing.machine(), "sampling": {}, "judge": judged, "rows": []}
    shown: dict[str, Pixels] = {}
    for model, drops in ((given.dit, (0.0,)), (given.dc_dit, DROPS)):
        chosen = settings_of(model, given)
        result["sampling"][model] = {**chosen, "seed": 0, "precision": "fp32"}
        job = prepare(SampleConfig(model=model, count=given.count, precision="fp32", **chosen))
        for drop in drops:
            row, images = measure(job, drop, judge, given.batch, data.class_names)
            result["rows"].append(row)
            title = "DiT" if len(drops) == 1 else f"DC-DiT\ntail drop {drop:g}"
            shown[title] = images
            print(
                json.dumps({key: row[key] for key in ("model", "tail_drop", "accuracy", "kept", "seconds")}), flush=True
            )
    result["router"] = router_rows(given.dc_dit, data)
    result["missed"] = missed(result)
    timing.write(given.out, result)
    print(f"\n{table(result)}\n\n{router_table(result)}")
    given.figures.mkdir(parents=True, exist_ok=True)
    draw_pictures(shown, data.class_names, given.dc_dit, given.figures)
    return command_line.finish(result["missed"])


if __name__ == "__main__":
    sys.exit(main())
