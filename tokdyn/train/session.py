"""Start a training run in an empty folder, or resume the run that a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from tokdyn.errors import CheckpointError
from tokdyn.files import require_folder
from tokdyn.host import settle_memory
from tokdyn.recipe import Recipe, dump
from tokdyn.train import checkpoints, metrics
from tokdyn.train.loop import Loop, Preview, Result
from tokdyn.train.progress import ProgressLine
from tokdyn.train.resume import check_resumable, flatten
from tokdyn.train.setup import open_accelerator, set_up
from tokdyn.train.signals import StopRequest


def train(
    recipe: Recipe, resume: bool = False, console: Console | None = None, preview: Preview | None = None
) -> Result:
    """Train a model as a recipe says, or resume its run.

    The first Ctrl-C (or SIGTERM) finishes the step, writes a checkpoint and returns; a second one interrupts at once.

    Args:
        recipe: The recipe. A run is resumed with the recipe that started it, apart from the settings that
            `tokdyn.train.resume` allows to change.
        resume: Continue from the newest undamaged checkpoint in the recipe's folder, bit for bit. If the run has no
            checkpoint yet, start again at step 0.
        console: Where to show the progress; stderr if None.
        preview: Draws the previews that `training.sample_every` asks for: `tokdyn.train.preview.draw_preview`, or a
            function of your own.

    Returns:
        The steps taken and the last metrics. `finished` is False if the run was interrupted.

    Raises:
        CheckpointError: Without `resume`, the folder is not empty; with it, the folder holds no run, the run cannot
            continue with this recipe, or all its checkpoints are damaged; or a checkpoint could not be written.
        TokdynError: The recipe or the data are wrong, or the loss is no longer finite.
    """
    settle_memory()
    folder = Path(recipe.folder)
    checkpoint = None
    if resume:
        checkpoint = _newest_or_none(folder)
    else:
        _check_unused(folder)
    accelerator = open_accelerator(recipe)
    run = set_up(recipe, accelerator, fresh=checkpoint is None)
    start, spent, notes = 0, 0.0, []
    if checkpoint is not None:
        differing = check_resumable(checkpoint.state, recipe, run.dataset.identity(), str(folder), run.base)
        run.trainee.restore(checkpoint.folder)
        start, spent = checkpoint.step, float(checkpoint.state["seconds"])
        notes = [*checkpoint.skipped, f"Resumed {folder} at step {start}."]
        if differing:
            notes.append(f"Changed since the run was started, which may change its rounding: {', '.join(differing)}.")
    elif resume:
        notes = [f"{folder} has no checkpoint yet, so the run starts again at step 0."]
    if checkpoint is None and accelerator.is_main_process:
        run.dataset.identity()  # before the first step, because it may read all files
    if recipe.training.sample_every and preview is None:
        notes.append(
            "No previews will be drawn: training.sample_every is set, but train was given no preview function."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(folder / "recipe.yaml", dump(recipe))
        metrics.remove_after(folder / "metrics.jsonl", start)
        if run.upcycled is not None:
            if start == 0:
                notes += [f"{name:<12} {value}" for name, value in run.upcycled.lines()]
            checkpoints.write_text(
                folder / "upcycle.json", json.dumps({**(run.base or {}), **run.upcycled.as_dict()}, indent=1)
            )
    if recipe.training.trackers:
        config = {
            key: value for key, value in flatten(recipe.model_dump()).items() if isinstance(value, int | float | str)
        }
        accelerator.init_trackers("tokdyn", config=config)
    with StopRequest() as stop, ProgressLine(run.steps, start, accelerator.is_main_process, console) as line:
        for note in notes:
            line.note(note)
        result = Loop(run, folder, spent, line, stop, preview).go(start)
    if recipe.training.trackers:
        accelerator.end_training()
    return result


def _check_unused(folder: Path) -> None:
    """Raise an error unless the folder is empty or does not exist, and can be written to."""
    require_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; continue it with --resume or choose another out=FOLDER.")


def _newest_or_none(folder: Path) -> checkpoints.Checkpoint | None:
    """Return the newest undamaged checkpoint of a run, or None if it was stopped before its first one."""
    checkpoint = checkpoints.newest(folder / "checkpoints")
    if checkpoint is None and not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"There is no run to resume in {folder}; start it without --resume.")
    return checkpoint
