"""Run the training loop: take steps, write log lines and checkpoints, draw previews, and stop when the user asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import torch
from torch import Tensor

from tokdyn.division import computing
from tokdyn.progress import duration
from tokdyn.recipe import Recipe, dump
from tokdyn.train import checkpoints, metrics, schedule
from tokdyn.train.batches import Division
from tokdyn.train.guard import Guard
from tokdyn.train.metrics import Row
from tokdyn.train.progress import ProgressLine
from tokdyn.train.setup import Run
from tokdyn.train.sharding import clip_gradients
from tokdyn.train.signals import StopRequest
from tokdyn.train.snapshot import save_model
from tokdyn.train.step import RatioTerm, micro_step
from tokdyn.upcycling.phases import drop_frozen_gradients

Preview = Callable[[Any, Recipe, Path, int], object]
"""A function `preview(model, recipe, folder, step)` that draws previews; `model` is the averaged model."""

EXIT_INTERRUPTED = 130
_POLL = 8  # several processes agree whether to stop every so many steps
_TICK = 1e-9  # seconds; a clock may stand still between two log lines


@dataclass(frozen=True)
class Result:
    """The result of `train`.

    Attributes:
        folder: The run's folder.
        step: Optimizer steps taken since the run was started, those before it was resumed included.
        steps: Optimizer steps of the whole run.
        row: The last line of metrics; empty if this call logged none.
        signal: The signal that asked the run to stop; None if none did.
    """

    folder: Path
    step: int
    steps: int
    row: Row
    signal: Signals | None = None

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step; if not, it was interrupted and can be resumed."""
        return self.step >= self.steps

    @property
    def exit_code(self) -> int:
        """The exit code of `tokdyn train`: 130 if Ctrl-C stopped the run before its last step, otherwise 0."""
        return EXIT_INTERRUPTED if not self.finished and self.signal == SIGINT else 0


class Loop:
    """The training loop of one call of `train`.

    Args:
        run: The run to start or to continue.
        folder: The run's folder.
        spent: Seconds of training before the run was resumed.
        line: Shows the progress.
        stop: Remembers the signal by which the user asks to stop.
        preview: Draws the previews; None draws none.
        check_folder: Raises an error if the run's folder is not there any more.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        spent: float,
        line: ProgressLine,
        stop: StopRequest,
        preview: Preview | None = None,
        check_folder: Callable[[], None] = lambda: None,
    ) -> None:
        self.run = run
        self.folder = folder
        self.spent = spent
        self.line = line
        self.stop = stop
        self.preview = preview
        self.division = Division(run)
        self.check_folder = check_folder
        self.guard = Guard(run, folder, line.note)
        self.row: Row = {}
        self.began = self.last_save = self.last_log = time.monotonic()
        self.last_logged = 0

    def go(self, start: int) -> Result:
        """Take the remaining steps, until the last one or until the user asks to stop.

        Args:
            start: Steps already taken.
        """
        run, training = self.run, self.run.recipe.training
        self.last_logged = start
        if training.on_bad_loss == "roll_back" and not checkpoints.steps_of(self.folder / "checkpoints"):
            self._save(start)
        batches = run.stream.loader(start * training.accumulation, run.steps * training.accumulation, training.workers)
        step, asked = start, None
        while step < run.steps and asked is None:
            self._step(step, batches)
            step += 1
            self.line.step(step)
            if step % training.log_every == 0 or step == run.steps:
                self._log(step)
            if training.sample_every and (step % training.sample_every == 0 or step == run.steps):
                self._draw(step)
            asked, due = self._agree(step)
            if asked or due or step % training.checkpoint_every == 0 or step == run.steps:
                self._save(step)
        if step >= run.steps:
            self._finish(step)
        elif asked is not None:
            self.line.note(
                f"Stopped and saved at step {step}, as {asked.name} asked; continue with: tokdyn train {self.folder} "
                "--resume"
            )
        return Result(self.folder, step, run.steps, self.row, asked)

    def _step(self, step: int, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Take one optimizer step, on the micro-batches of this process.

        Args:
            step: Steps already taken.
            batches: Yields the images (B, C, H, W) and the labels (B,) of the micro-batches.
        """
        run, recipe, trainee = self.run, self.run.recipe, self.run.trainee
        training, device = recipe.training, run.accelerator.device
        rate = schedule.run_learning_rate(recipe, step, run.steps)
        for group in trainee.optimizer.param_groups:
            group["lr"] = rate
        chunking, drop = None, 0.0
        if recipe.chunking is not None:
            target = schedule.target(recipe.chunking, recipe.model.target, step)
            chunking = RatioTerm(target, recipe.chunking.ratio_weight, recipe.chunking.ratio_group)
        collected: list[dict[str, Tensor]] = []
        for batch in self.division.micro_batches(step, batches, chunking):
            drop += batch.tail_drop / training.accumulation
            alone = not batch.last and not run.sharded  # shards are summed at once: whole gradients do not fit
            with computing(batch.part), run.accelerator.no_sync(run.wrapped) if alone else nullcontext():
                out = micro_step(
                    run.wrapped, recipe.objective, batch.draws, training.precision, chunking, batch.phase_batch
                )
                run.accelerator.backward(out.loss / training.accumulation)
            collected.append(out.metrics)
        if recipe.upcycle is not None:
            drop_frozen_gradients(trainee.model, recipe.upcycle.phase(step)[0])
        parameters = [parameter for group in trainee.optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(parameters, recipe.optimizer.clip or float("inf"))
        means: dict[str, Tensor | float] = {
            name: sum((entry[name] for entry in collected), torch.zeros((), device=device)) / training.accumulation
            for name in collected[0]
        }
        if chunking is not None:
            means["tail_drop"] = drop
        means["grad_norm"] = norm
        if self.guard.refuses(means):
            self.guard.pass_over(step + 1, means)
        else:
            run.stepper.step()
            trainee.ema.update(step)
            trainee.window.add(step + 1, means)
        run.stepper.zero_grad(set_to_none=True)

    def _check(self, step: int) -> None:
        """Raise an error if the losses are bad or the folder is not there; called before anything is written."""
        self.guard.check(step)
        if self.run.accelerator.is_main_process:
            self.check_folder()

    def _log(self, step: int) -> None:
        """Write and show the mean metrics of the steps since the last log line."""
        run, recipe = self.run, self.run.recipe
        self._check(step)
        means = run.trainee.window.means(run.accelerator)
        run.trainee.window.clear()
        now = time.monotonic()
        batch = recipe.training.batch_size
        self.row = {
            "step": step,
            "images": step * batch,
            "epoch": step * batch / len(run.dataset),
            **means,
            "lr": schedule.run_learning_rate(recipe, step - 1, run.steps),
        }
        if recipe.chunking is not None:
            self.row["target"] = schedule.target(recipe.chunking, recipe.model.target, step - 1)
        self.row["images_per_second"] = (step - self.last_logged) * batch / max(_TICK, now - self.last_log)
        self.row["seconds"] = self.spent + now - self.began
        self.last_log, self.last_logged = now, step
        if run.accelerator.is_main_process:
            metrics.append(self.folder / metrics.METRICS, self.row)
        if recipe.training.trackers:
            run.accelerator.log({key: value for key, value in self.row.items() if key != "step"}, step=step)
        self.line.log(step, self.row)
        if recipe.chunking is not None:
            self.guard.look_at_router(step, self.row, self.row["target"])

    def _agree(self, step: int) -> tuple[Signals | None, bool]:
        """Return the signal that asks to stop, and whether a checkpoint is due by time; the same on all processes.

        Several processes ask each other only every `_POLL` steps; between those nothing is asked for and nothing due.
        """
        minutes = self.run.recipe.training.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.last_save > 60.0 * minutes
        accelerator, mine = self.run.accelerator, self.stop.signal
        if accelerator.num_processes == 1:
            return mine, due
        if step % _POLL:
            return None, False
        flags = torch.tensor([mine == SIGINT, mine is not None, due], dtype=torch.int32)
        flags = accelerator.reduce(flags.to(accelerator.device), "sum")
        interrupted, asked, timed = (flags > 0).tolist()
        return (SIGINT if interrupted else SIGTERM) if asked else None, timed

    def _save(self, step: int) -> None:
        """Write a checkpoint: on the main process, or on all if the weights are sharded."""
        run, recipe = self.run, self.run.recipe
        root = self.folder / "checkpoints"
        self._check(step)

        def write(folder: Path) -> None:
            run.trainee.save(folder)
            for name in metrics.LOGS:
                metrics.copy(self.folder / name, folder)

        if run.accelerator.is_main_process:
            contents = {
                "images": step * recipe.training.batch_size,
                "seconds": self.spent + time.monotonic() - self.began,
                "recipe": recipe.model_dump(mode="json"),
                "data": run.dataset.identity(),
                "base": run.base,
                "versions": {"torch": torch.__version__},
            }
            checkpoints.save(root, step, write, contents, recipe.training.keep_checkpoints)
        elif run.sharded:
            checkpoints.write_part(root, step, lambda folder: run.trainee.save(folder, main=False))
        run.accelerator.wait_for_everyone()
        self.guard.saved()
        self.last_save = time.monotonic()

    def _draw(self, step: int) -> None:
        """Draw previews, on the main process."""
        run = self.run
        self._check(step)
        main = run.accelerator.is_main_process
        average = None if self.preview is None else run.trainee.average(keep=main)
        if main and self.preview is not None:
            self.preview(average, run.recipe, self.folder, step)
        run.accelerator.wait_for_everyone()

    def _finish(self, step: int) -> None:
        """Write the averaged model into the folder `model`, from which `tokdyn sample` loads it."""
        run = self.run
        average = run.trainee.average(keep=run.accelerator.is_main_process)
        if run.accelerator.is_main_process:

            def write(folder: Path) -> None:
                save_model(average, folder, run.trainee.info)
                (folder / "recipe.yaml").write_text(dump(run.recipe), encoding="utf-8")

            checkpoints.write_folder(self.folder / "model", write)
        run.accelerator.wait_for_everyone()
        taken = duration(self.spent + time.monotonic() - self.began)
        self.line.note(f"Finished {step} steps in {taken}; the model is in {self.folder / 'model'}.")
