"""Make a training, finished or still running, one of the models that ship with the package.

    python -m benchmarks.ship runs/shapes/dit shapes/dit
    python -m benchmarks.ship runs/shapes/dc-dit shapes/dc-dit
    python tests/catalog_file.py        # `tokdyn models` lists what is there

The averaged weights are stored with a description of the training (tokdyn.json), its recipe and log, and the images
that they draw (sample.png), in tokdyn/bases/NAME. The recipe must be that of the repository, recipes/NAME.yaml. With
eight bits, each row of a matrix has a scale of its own; the command prints how near the images are to those of the
weights in fp32. Measure the models with `python -m benchmarks.shipped`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tokdyn import recipe as recipes
from tokdyn.bases import read_base
from tokdyn.bases.converting import DTYPES
from tokdyn.bases.table import shipped_folder
from tokdyn.bench.fidelity import psnr
from tokdyn.checkpoints.writer import write
from tokdyn.errors import RecipeError, TokdynError
from tokdyn.recipe import Recipe
from tokdyn.recipe.build import total_steps
from tokdyn.report.pixels import Pixels, write_png
from tokdyn.sample import SampleConfig, load_model
from tokdyn.sample.drawing import draw
from tokdyn.sample.job import prepare
from tokdyn.train import metrics
from tokdyn.train.checkpoints import newest

NAMES = ("shapes/dit", "shapes/dc-dit")
LIMIT = 8_000_000  # bytes of all files of these models together
SAMPLE = "sample.png"
_FREE = ("name", "description", "out")  # keys of a recipe that do not decide what is trained
_LINES = 120  # of the log that is kept


def ship(
    run: Path, name: str, root: Path, dtype: str = "int8", steps: int = 25, guidance: float = 3.0, force: bool = False
) -> dict[str, Any]:
    """Write the averaged weights of a run, and what is known of them, into a folder.

    Args:
        run: folder of the training.
        name: name of the model and of its recipe.
        root: folder that the model's folder is written to; an earlier one of this name is replaced.
        dtype: how the weights are stored: int8, bf16 or fp16.
        steps: sampling steps that the model needs, which are recorded.
        guidance: scale of guidance that it needs, likewise.
        force: accept a run whose recipe is not that of the repository.

    Returns:
        The contents of tokdyn.json.

    Raises:
        TokdynError: there is no run, its recipe is another one, or the models would be too large.
    """
    recipe = recipes.load(run / "recipe.yaml")
    changed = differences(recipe, recipes.load(name))
    if changed and not force:
        raise RecipeError(
            f"{run} was not trained by the recipe {name}: {', '.join(changed)} differ; change one of the two, or give "
            "--force."
        )
    _, _, info = load_model(run)
    base = read_base(str(info.path))
    with TemporaryDirectory(dir=root, prefix=".ship-") as temporary:
        made = write(base.model, Path(temporary) / "model", "tokdyn", DTYPES[dtype], base.facts).place
        (made / "recipe.yaml").write_text(recipes.dump(recipe.model_copy(update={"out": None})), encoding="utf-8")
        (made / "metrics.jsonl").write_text(_log(run), encoding="utf-8")
        drawn, whole = (ten_images(str(place), steps, guidance) for place in (made, info.path))
        write_png(np.concatenate(list(drawn), axis=1), made / SAMPLE)
        (weights,) = made.glob("*.safetensors")
        weights.chmod(0o644)  # safetensors lets nobody but the owner read what it writes
        similar = float(psnr(torch.from_numpy(drawn), torch.from_numpy(whole)).clamp(max=99.0).mean())
        facts = {
            **base.facts,
            "name": name,
            "sampling": {"steps": steps, "guidance": guidance},
            "training": {**_progress(run, recipe, info.step), "recipe": name, "commit": _commit(name)},
            "weights": {
                "dtype": dtype,
                "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
                "psnr_of_sample_to_fp32": similar,
            },
        }
        (made / "tokdyn.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        total = sum(size(made if each == name else root / each) for each in NAMES)
        if total > LIMIT:
            raise RecipeError(
                f"the models would take {total / 1e6:.2f} MB together, and may take {LIMIT / 1e6:g} MB: store both "
                "with --dtype int8, or train smaller ones."
            )
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        made.rename(root / name)
    return facts


def ten_images(model: str, steps: int, guidance: float) -> Pixels:
    """Draw an image of each class with the seeds 0 to 9, (10, H, W, 3) uint8."""
    job = prepare(SampleConfig(model=model, count=10, steps=steps, guidance=guidance, device="cpu", precision="fp32"))
    return draw(job, job.config.sampler(0.0, job.clip), range(10), None)[0]


def size(folder: Path) -> int:
    """Return the bytes of the files in a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Return the sections and keys in which two recipes differ and that decide what is trained."""
    first, second = (recipe.model_dump(mode="json", exclude=set(_FREE)) for recipe in (one, other))
    found = []
    for section, value in first.items():
        theirs = second[section]
        if isinstance(value, dict) and isinstance(theirs, dict):
            keys = value.keys() | theirs.keys()
            found += [f"{section}.{key}" for key in sorted(keys) if value.get(key) != theirs.get(key)]
        elif value != theirs:
            found.append(section)
    return found


def _progress(run: Path, recipe: Recipe, step: int | None) -> dict[str, Any]:
    """Return how far a run was trained; `step` is that of its checkpoint, None if it is finished."""
    checkpoint = newest(run / "checkpoints")
    running = step is not None and checkpoint is not None
    state = checkpoint.state if running else metrics.read(run / "metrics.jsonl")[-1]
    known = {"steps": state["step"], "images": state["images"], "seconds": round(state["seconds"])}
    return {**known, "planned_steps": total_steps(recipe), "ema": recipe.training.ema}


def _log(run: Path) -> str:
    """Return the log of a run, thinned to about 120 lines with five digits each."""
    rows = metrics.read(run / "metrics.jsonl")
    step = max(1, math.ceil(len(rows) / _LINES))
    kept = [*rows[:-1:step], *rows[-1:]]
    return "".join(json.dumps({key: _rounded(value) for key, value in row.items()}) + "\n" for row in kept)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _commit(name: str) -> str:
    """Return the last commit of a recipe; "unknown" outside of a repository."""
    words = ["git", "log", "-1", "--format=%H", "--", f"recipes/{name}.yaml"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def main() -> int:
    """Ship a run, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the training")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--dtype", choices=("int8", "bf16", "fp16"), default="int8")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps to record")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of guidance to record")
    parser.add_argument("--root", type=Path, default=shipped_folder("."), help="folder of the package's bases")
    parser.add_argument("--force", action="store_true", help="accept a run of another recipe")
    given = parser.parse_args()
    try:
        facts = ship(given.run, given.name, given.root, given.dtype, given.steps, given.guidance, given.force)
    except TokdynError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"training": facts["training"], "weights": facts["weights"]}, indent=1))
    print(f"{given.root / given.name}: {size(given.root / given.name) / 1e6:.2f} MB")
    print("Next: python tests/catalog_file.py, then python -m benchmarks.shipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
