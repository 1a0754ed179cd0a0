"""Train a small DC-DiT in the demo, sample it with three tail drops, draw pictures and score its router."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn import recipe as recipes
from tokdyn.data import open_data
from tokdyn.data.shapes import ShapesDataset
from tokdyn.demo.pictures import draw_router
from tokdyn.demo.router import RouterScore, score_router
from tokdyn.demo.settings import DemoSettings
from tokdyn.errors import CheckpointError
from tokdyn.recipe import Recipe
from tokdyn.recipe.build import total_steps
from tokdyn.sample import SampleConfig, SampleResult, load_model, sample
from tokdyn.train import train

BUDGETS = (0.0, 0.3, 0.6)
LEVELS = (0.1, 0.3, 0.5)
_DRAWN = 6  # images in the picture of the router
_POLL = 5  # training steps between checks of the time limit


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo.

    Attributes:
        folder: folder of the run.
        pictures: paths of the pictures that were drawn.
        samples: result of sampling, with the cost for each tail drop.
        router: score of the router at each noise level.
        steps: optimizer steps taken so far.
        planned: optimizer steps of the whole run.
        seconds_training: seconds that this call trained.
    """

    folder: Path
    pictures: tuple[Path, ...]
    samples: SampleResult
    router: tuple[RouterScore, ...]
    steps: int
    planned: int
    seconds_training: float


def demo(settings: DemoSettings) -> DemoResult:
    """Train a model with the recipe `demo`, then sample it and score its router.

    A stopped run in `settings.place` is resumed, and a finished one is only sampled and scored. If the time limit stops
    the training, the model is sampled and scored as it is.

    Raises:
        CheckpointError: the folder holds a run with other settings, or other files.
        KeyboardInterrupt: the user interrupted the training; the same call resumes it.
    """
    began, settings = time.perf_counter(), settings.model_copy(update={"train": True})
    recipe, steps = _train(settings)
    seconds = time.perf_counter() - began
    pictures = settings.place / "pictures"
    made = sample(
        SampleConfig(
            model=str(settings.place),
            out=pictures,
            count=settings.count,
            seed=settings.seed,
            steps=settings.sampling_steps or 25,
            guidance=2.0 if settings.guidance is None else settings.guidance,
            tail_drop=BUDGETS,
            maps=True,
        )
    )
    model, objective, _ = load_model(settings.place)
    data = open_data(recipe.data)
    assert isinstance(data, ShapesDataset)  # as the recipe `demo` says
    unseen = range(len(data), len(data) + settings.scored)  # indices beyond the epoch are not in the training set
    scores = tuple(score_router(model, objective, data, unseen, level, settings.seed) for level in LEVELS)
    path = draw_router(
        model, objective, data, range(len(data), len(data) + _DRAWN), LEVELS, pictures / "router.png", settings.seed
    )
    drawn = (*made.files, *(file for budget in made.budgets for file in budget.files), path)
    return DemoResult(settings.place, drawn, made, scores, steps, total_steps(recipe), seconds)


def _train(settings: DemoSettings) -> tuple[Recipe, int]:
    """Start the run, resume it, or leave a finished one as it is.

    Returns:
        The recipe, and the optimizer steps taken so far.

    Raises:
        CheckpointError: the folder holds a run with other settings, or other files.
        KeyboardInterrupt: the user interrupted the training.
    """
    overrides = [f"out={settings.place}", f"seed={settings.seed}", f"training.sample_every={_POLL}"]
    if settings.training_steps is not None:
        overrides.append(f"training.steps={settings.training_steps}")
    recipe = recipes.load("demo", overrides)
    started = (settings.place / "recipe.yaml").is_file()
    if started and recipes.load(settings.place / "recipe.yaml") != recipe:
        raise CheckpointError(
            f"{settings.place} holds a run with other settings; choose another out=FOLDER, or remove that folder."
        )
    if started and (settings.place / "model").is_dir():
        return recipe, total_steps(recipe)
    limit = _TimeLimit(60.0 * settings.minutes)
    result = train(recipe, resume=started, preview=limit)
    if not result.finished and not limit.reached:
        raise KeyboardInterrupt
    return recipe, result.step


class _TimeLimit:
    """Stops training when the time is up, by the signal of Ctrl-C.

    It is passed to `train` in place of the function that draws previews, which training calls every few steps.

    Args:
        seconds: Seconds from now.

    Attributes:
        reached: Whether the time was up.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.reached = False

    def __call__(self, model: Any, recipe: Recipe, folder: Path, step: int) -> None:
        if time.monotonic() > self._end and not self.reached:
            self.reached = True
            signal.raise_signal(signal.SIGINT)
