"""Train, sample at three budgets, draw, score the router."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from tokdyn import recipe as recipes
from tokdyn.data import open_data
from tokdyn.data.shapes import ShapesDataset
from tokdyn.demo.pictures import draw_router
from tokdyn.demo.router import RouterScore, score_router
from tokdyn.errors import CheckpointError
from tokdyn.recipe import Recipe
from tokdyn.sample import SampleConfig, SampleResult, load_model, sample
from tokdyn.train import train

BUDGETS = (0.0, 0.3, 0.6)
LEVELS = (0.1, 0.3, 0.5)
_SCORED = 256  # images that the router is scored on
_DRAWN = 6  # of them drawn


class DemoSettings(BaseModel):
    """Settings of the tour.

    Attributes:
        out: folder for the run and its pictures.
        training_steps: optimizer steps; none takes those of the recipe `demo`.
        sampling_steps: model calls per image.
        count: images per budget; classes are dealt out in turn.
        seed: of the training and the samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path = Path("runs/demo")
    training_steps: PositiveInt | None = None
    sampling_steps: PositiveInt = 25
    count: PositiveInt = 10
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class DemoResult:
    """What the tour found.

    Attributes:
        folder: the run.
        pictures: the files that were drawn.
        samples: what sampling at each budget cost.
        router: score of the router at each noise level.
        seconds_training: wall time of the training in this call; 0 when the run was already complete.
    """

    folder: Path
    pictures: tuple[Path, ...]
    samples: SampleResult
    router: tuple[RouterScore, ...]
    seconds_training: float


def demo(settings: DemoSettings) -> DemoResult:
    """Train the recipe `demo`, or use the finished run in the folder, then sample and score it.

    Raises:
        CheckpointError: the folder holds something else.
        KeyboardInterrupt: the training was interrupted; the same call continues it.
    """
    overrides = [f"out={settings.out}", f"seed={settings.seed}", "training.sample_every=null"]
    if settings.training_steps is not None:
        overrides.append(f"training.steps={settings.training_steps}")
    recipe = recipes.load("demo", overrides)
    began = time.perf_counter()
    trained = _train(recipe, settings.out)
    seconds = time.perf_counter() - began if trained else 0.0
    pictures = settings.out / "pictures"
    made = sample(
        SampleConfig(
            model=str(settings.out),
            out=pictures,
            count=settings.count,
            seed=settings.seed,
            scheduler="ddim",
            steps=settings.sampling_steps,
            tail_drop=BUDGETS,
            maps=True,
        )
    )
    model, objective, _ = load_model(settings.out)
    data = open_data(recipe.data)
    assert isinstance(data, ShapesDataset)  # the recipe says so
    unseen = range(len(data), len(data) + _SCORED)  # beyond the epoch, so never trained on
    scores = tuple(score_router(model, objective, data, unseen, level, settings.seed) for level in LEVELS)
    path = draw_router(model, objective, data, unseen[:_DRAWN], LEVELS, pictures / "router.png", settings.seed)
    drawn = (*made.files, *(file for budget in made.budgets for file in budget.files), path)
    return DemoResult(settings.out, drawn, made, scores, seconds)


def _train(recipe: Recipe, folder: Path) -> bool:
    """Train unless the folder holds this very run, finished; True if anything was trained."""
    started = (folder / "recipe.yaml").is_file()
    if started and recipes.load(folder / "recipe.yaml") != recipe:
        raise CheckpointError(f"{folder} holds a run with other settings; choose another out=FOLDER or remove it.")
    if started and (folder / "model").is_dir():
        return False
    result = train(recipe, resume=started)
    if not result.finished:
        raise KeyboardInterrupt
    return True
