"""Start a training run in an empty folder, or resume the run that a folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from tokdyn.errors import CheckpointError
from tokdyn.files import require_folder
from tokdyn.host import settle_memory
from tokdyn.ownership import holds_nothing, owning
from tokdyn.recipe import Recipe, dump
from tokdyn.train import checkpoints, metrics
from tokdyn.train.failures import explained
from tokdyn.train.loop import Loop, Preview, Result
from tokdyn.train.progress import ProgressLine
from tokdyn.train.resume import check_complete, check_resumable, flatten
from tokdyn.train.setup import open_accelerator, set_up
from tokdyn.train.signals import StopRequest


def train(
    recipe: Recipe, resume: bool = False, console: Console | None = None, preview: Preview | None = None
) -> Result:
    """Train a model as a recipe says, or resume its run.

    The first Ctrl-C, SIGTERM or SIGHUP finishes the step, writes a checkpoint and returns; a second one interrupts at
    once. The folder of the run has one owner at a time.

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
        OutputError: The folder is in use by another process, cannot be written to, or has vanished.
        TokdynError: The recipe or the data are wrong, the loss is not finite or too large, the router has collapsed, or
            a process that loads data or trains along has ended.
    """
    settle_memory()
    folder = Path(recipe.folder)
    require_folder(folder)
    if resume:
        _require_run(folder)
    accelerator = None
    try:
        accelerator = open_accelerator(recipe)
        owner: AbstractContextManager[Callable[[], None]] = nullcontext(lambda: None)
        if accelerator.is_main_process:
            owner = owning(folder)
        with owner as check_folder:
            return _train(recipe, resume, console, preview, accelerator, check_folder)
    except RuntimeError as error:
        told = explained(error, accelerator, folder)
        if told is None:
            raise
        raise told from error


def _train(
    recipe: Recipe,
    resume: bool,
    console: Console | None,
    preview: Preview | None,
    accelerator: Accelerator,
    check_folder: Callable[[], None],
) -> Result:
    """Train in a folder that this process, or the main one of several, owns."""
    folder, main = Path(recipe.folder), accelerator.is_main_process
    if main:
        if not resume and not holds_nothing(folder):
            raise CheckpointError(f"{folder} is not empty; continue it with --resume or choose another out=FOLDER.")
        checkpoints.clear(folder)
    checkpoint = checkpoints.newest(folder / "checkpoints", check_complete) if resume else None
    _check_agreed(accelerator, folder, None if checkpoint is None else checkpoint.step)
    run = set_up(recipe, accelerator, fresh=checkpoint is None)
    start, spent, notes = 0, 0.0, []
    if checkpoint is not None:
        differing = check_resumable(checkpoint.state, recipe, run.dataset.identity(), str(folder), run.base)
        run.trainee.restore(checkpoint.folder)
        start, spent = checkpoint.step, float(checkpoint.state["seconds"])
        notes = [" ".join([f"Resumed {folder} at step {start}{_why(checkpoint.skipped)}", *checkpoint.skipped])]
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
    if main:
        check_folder()
        checkpoints.write_text(folder / "recipe.yaml", dump(recipe))
        for name in metrics.LOGS:
            kept = None if checkpoint is None else checkpoint.folder / name
            notes += filter(None, [metrics.restore(folder / name, kept, start)])
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
    with StopRequest() as stop, ProgressLine(run.steps, start, main, console) as line:
        for note in notes:
            line.note(note)
        result = Loop(run, folder, spent, line, stop, preview, check_folder).go(start)
    if recipe.training.trackers:
        accelerator.end_training()
    return result


def _check_agreed(accelerator: Accelerator, folder: Path, step: int | None) -> None:
    """Check that all processes resume at the same step.

    Raises:
        CheckpointError: They do not.
    """
    own = torch.tensor([-1 if step is None else step], device=accelerator.device)
    steps = sorted(set(accelerator.gather(own).tolist()))
    if len(steps) > 1:
        raise CheckpointError(
            f"The processes see different checkpoints in {folder} (of steps {', '.join(map(str, steps))}; -1 is none); "
            "choose an out=FOLDER that all of them see, on a disk that their machines share."
        )


def _why(skipped: tuple[str, ...]) -> str:
    """Return how the sentence about a resumed run ends."""
    if not skipped:
        return "."
    return f", because {'a newer checkpoint is' if len(skipped) == 1 else f'{len(skipped)} newer ones are'} damaged:"


def _require_run(folder: Path) -> None:
    """Raise an error unless a folder holds a run, which may have been stopped before its first checkpoint."""
    if not checkpoints.steps_of(folder / "checkpoints") and not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"There is no run to resume in {folder}; start it without --resume.")
