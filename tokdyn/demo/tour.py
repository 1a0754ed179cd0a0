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
from tokdyn.recipe.build import planned_steps
from tokdyn.sample import SampleConfig, SampleResult, load_model, sample
from tokdyn.train import dry_run, train

BUDGETS = (0.0, 0.3, 0.6)
LEVELS = (0.1, 0.3, 0.5)
_SCORED = 256  # images that the router is scored on
_DRAWN = 6  # of them drawn


class DemoSettings(BaseModel):
    """Settings of the tour.

    Attributes:
        out: folder for the run and its pictures.
        minutes: time that training may take; fewer steps are taken on a machine that would need longer.
        training_steps: optimizer steps, whatever they take; none takes those of the recipe `demo`, within `minutes`.
        sampling_steps: steps per image.
        guidance: scale of classifier-free guidance.
        count: images per budget; classes are dealt out in turn.
        seed: of the training and the samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path = Path("runs/demo")
    minutes: float = Field(default=2.5, gt=0.0)
    training_steps: PositiveInt | None = None
    sampling_steps: PositiveInt = 25
    guidance: float = Field(default=2.0, ge=0.0)
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
        steps: optimizer steps that the model was trained for.
        seconds_training: wall time of the training in this call; 0 when the run was already complete.
    """

    folder: Path
    pictures: tuple[Path, ...]
    samples: SampleResult
    router: tuple[RouterScore, ...]
    steps: int
    seconds_training: float


def demo(settings: DemoSettings) -> DemoResult:
    """Train the recipe `demo`, or use the finished run in the folder, then sample and score it.

    Raises:
        CheckpointError: the folder holds something else.
        KeyboardInterrupt: the training was interrupted; the same call continues it.
    """
    began = time.perf_counter()
    recipe, trained = _train(settings)
    seconds = time.perf_counter() - began if trained else 0.0
    pictures = settings.out / "pictures"
    made = sample(
        SampleConfig(
            model=str(settings.out),
            out=pictures,
            count=settings.count,
            seed=settings.seed,
            steps=settings.sampling_steps,
            guidance=settings.guidance,
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
    return DemoResult(settings.out, drawn, made, scores, planned_steps(recipe), seconds)


def _train(settings: DemoSettings) -> tuple[Recipe, bool]:
    """Train unless the folder holds this very run, finished; the recipe, and whether anything was trained."""
    overrides = [f"out={settings.out}", f"seed={settings.seed}", "training.sample_every=null"]
    if settings.training_steps is not None:
        overrides.append(f"training.steps={settings.training_steps}")
    recipe = recipes.load("demo", overrides)
    kept = settings.out / "recipe.yaml"
    if kept.is_file():
        stored = recipes.load(kept)
        same_length = stored if settings.training_steps is None else recipe
        if stored != _with_steps(recipe, same_length.training.steps):
            raise CheckpointError(
                f"{settings.out} holds a run with other settings; choose another out=FOLDER or remove it."
            )
        if (settings.out / "model").is_dir():
            return stored, False
        result = train(stored, resume=True)
    else:
        if settings.training_steps is None:
            recipe = _with_steps(recipe, _affordable_steps(recipe, 60.0 * settings.minutes))
        result = train(recipe)
    if not result.finished:
        raise KeyboardInterrupt
    return recipe, True


def _with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": steps})})


def _affordable_steps(recipe: Recipe, seconds: float) -> int | None:
    """The recipe's steps, or as many as this machine takes in the time if those are fewer."""
    per_step = dry_run(recipe).seconds_per_step
    if per_step is None or recipe.training.steps is None:
        return recipe.training.steps
    return max(1, min(recipe.training.steps, int(seconds / per_step)))
