"""Watch a run for losses that are bad or spike and for a router that has collapsed, and name the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokdyn.data import BatchStream
from tokdyn.errors import TokdynError
from tokdyn.train import checkpoints, metrics
from tokdyn.train.setup import Run

_MOST = 10  # steps passed over in a row, or since the checkpoint that a run rolls back to, before it stops
_REMEMBERED, _ENOUGH = 64, 16  # losses that the next one is compared with, and how many there must be
_FAR = 3  # a router has collapsed if it keeps, or leaves out, less than a third of what it should
_LINES = 2  # log lines in a row that show it
_NAMED = 5  # samples that a sentence lists


def spikes(recent: list[float], losses: list[tuple[int, float]], factor: float) -> list[tuple[int, float, float]]:
    """Find the losses that are `factor` times the median of those before them, and append all to `recent`.

    Args:
        recent: Losses of the last steps; changed in place.
        losses: Step and loss of the next ones.
        factor: How many times the median makes a spike.

    Returns:
        Step, loss and median of each spike. Spikes are not appended.
    """
    found = []
    for step, loss in losses:
        usual = median(recent) if len(recent) >= _ENOUGH else math.inf
        if not math.isfinite(loss) or loss > factor * usual:
            found.append((step, loss, usual))
            continue
        recent.append(loss)
        del recent[:-_REMEMBERED]
    return found


def collapsed(kept: float, target: float) -> bool:
    """Return whether a router keeps, or leaves out, less than a third of what it should.

    Args:
        kept: Share of the tokens that it keeps.
        target: N: one of N tokens should be kept.
    """
    return kept < 1 / target / _FAR or 1 - kept < (1 - 1 / target) / _FAR


class Guard:
    """The watch over one call of `train`.

    Args:
        run: The run.
        folder: The run's folder, which receives events.jsonl.
        note: Shows a sentence.
    """

    def __init__(self, run: Run, folder: Path, note: Callable[[str], None]) -> None:
        self.run = run
        self.folder = folder
        self.note = note
        self._passed_over = 0
        self._collapsed = 0

    def refuses(self, values: Mapping[str, Tensor | float]) -> bool:
        """Return whether a step must not be taken, on any process: its loss or its gradient is bad.

        With `on_bad_loss: stop` it is False, and `check` stops the run at the next log line: no step waits for the
        device.

        Args:
            values: The metrics of the step.
        """
        training, accelerator = self.run.recipe.training, self.run.accelerator
        if training.on_bad_loss == "stop":
            return False
        loss, norm = (torch.as_tensor(values[name]).float().reshape(()) for name in ("loss", "grad_norm"))
        limit = math.inf if training.loss_limit is None else training.loss_limit
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm) & (loss <= limit))
        refused = bool(accelerator.reduce(bad.float().to(accelerator.device), "sum") > 0)
        if not refused and training.on_bad_loss == "skip":
            self._passed_over = 0
        return refused

    def pass_over(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Go on without a step; with `on_bad_loss: roll_back` from the weights of the newest checkpoint.

        Args:
            step: Number of the step, counted from 1.
            values: Its metrics.

        Raises:
            TokdynError: Too many steps were passed over.
        """
        rolls_back = self.run.recipe.training.on_bad_loss == "roll_back"
        self._passed_over += 1
        what = f"its loss is {float(values['loss']):.4g} and the norm of its gradient {float(values['grad_norm']):.4g}"
        if self._passed_over > _MOST:
            raise TokdynError(
                f"{_MOST} steps {'since the last checkpoint' if rolls_back else 'in a row'} were passed over, and step "
                f"{step} is bad, too: {what}. Start a new run with a lower optimizer.lr or a longer "
                "optimizer.warmup_steps."
            )
        done, event, facts = f"Step {step} was skipped", "skipped", {"loss": float(values["loss"])}
        if rolls_back:
            checkpoint = checkpoints.newest(self.folder / "checkpoints")
            if checkpoint is None:
                raise TokdynError(f"Step {step} is bad ({what}), and there is no checkpoint to roll back to.")
            self.run.trainee.restore(checkpoint.folder)
            done = f"At step {step} the run was rolled back to the weights of step {checkpoint.step}"
            event, facts = "rolled_back", {**facts, "weights_of_step": checkpoint.step}
        self._tell(step, event, f"{done}: {what}", facts)

    def saved(self) -> None:
        """Count anew how often the run rolls back, after a checkpoint."""
        if self.run.recipe.training.on_bad_loss == "roll_back":
            self._passed_over = 0

    def check(self, step: int) -> None:
        """Log the spikes since the last call, and stop a run that has taken a bad step. Every process calls it.

        Args:
            step: Steps taken.

        Raises:
            TokdynError: A loss or a gradient was bad.
        """
        training, window, accelerator = self.run.recipe.training, self.run.trainee.window, self.run.accelerator
        losses, bad = window.take_losses(accelerator), window.first_bad(accelerator)
        for number, loss, usual in spikes(window.recent, losses, training.spike or math.inf):
            if bad is None:
                what = f"The loss of step {number} is {loss:.4g}, {loss / usual:.3g} times the usual {usual:.4g}"
                self._tell(number, "spike", what, {"loss": loss, "usual": usual})
        if bad is None:
            return
        last = checkpoints.steps_of(self.folder / "checkpoints")
        kept = f"the checkpoint of step {last[-1]} is kept" if last else "there is no checkpoint yet"
        loss = dict(losses).get(bad, math.nan)
        self._log(bad, "stopped", {"loss": loss, **self._repeating(bad)})
        raise TokdynError(
            f"The loss or its gradient is bad since step {bad} (a loss of {loss:.4g}, found at step {step}); its "
            f"batch is {self._batch(bad)}, and {kept}. Continue with --resume training.on_bad_loss=skip or roll_back, "
            "or start again with a lower optimizer.lr, a longer optimizer.warmup_steps or training.precision=fp32."
        )

    def look_at_router(self, step: int, row: Mapping[str, Any], target: float) -> None:
        """Say once that the router has collapsed, if two log lines in a row show it, or stop the run if asked to.

        Args:
            step: Steps taken.
            row: The log line.
            target: N: one of N tokens should be kept.

        Raises:
            TokdynError: It has, and `chunking.on_collapse` is "stop".
        """
        kept = row.get("natural_kept")
        if kept is None or not collapsed(kept, target):
            self._collapsed = 0
            return
        self._collapsed += 1
        if self._collapsed != _LINES:
            return
        what = f"The router keeps {kept:.1%} of the tokens at step {step}, where {1 / target:.1%} are asked for"
        self._log(step, "router", {"kept": kept, "target": target})
        chunking = self.run.recipe.chunking
        way = "Start again with a lower optimizer.lr or a higher chunking.ratio_weight."
        if chunking is not None and chunking.on_collapse == "stop":
            raise TokdynError(f"{what}. {way}")
        self.note(f"{what}, so it has collapsed. {way}")

    def _tell(self, step: int, event: str, what: str, facts: dict[str, Any]) -> None:
        """Show a sentence about a step that names its batch, and write it to events.jsonl."""
        self._log(step, event, {**facts, **self._repeating(step)})
        self.note(f"{what}; seed={self.run.recipe.seed} repeats it with {self._batch(step)}.")

    def _log(self, step: int, event: str, facts: dict[str, Any]) -> None:
        """Write an event to events.jsonl; JSON has no numbers that are not finite, so they are text there."""
        if self.run.accelerator.is_main_process:
            bad = {key: str(each) for key, each in facts.items() if isinstance(each, float) and not math.isfinite(each)}
            metrics.append(self.folder / metrics.EVENTS, {"step": step, "event": event, **facts, **bad})

    def _repeating(self, step: int) -> dict[str, Any]:
        """Return the seed and the samples that repeat a step."""
        return {"seed": self.run.recipe.seed, "samples": batch_of(self.run, step)}

    def _batch(self, step: int) -> str:
        """Describe the batch of a step."""
        samples = batch_of(self.run, step)
        names = getattr(self.run.dataset, "names", None)
        listed = [str(names[index]) if names else str(index) for index in samples[:_NAMED]]
        more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
        return f"sample{'' if len(samples) == 1 else 's'} {', '.join(listed)}{more}"


def batch_of(run: Run, step: int) -> list[int]:
    """Return the indices in the data set (B,) of the batch of a step, over all processes.

    Args:
        run: The run.
        step: Number of the step, counted from 1.
    """
    stream = BatchStream(run.dataset, run.recipe.training.batch_size, run.recipe.seed)
    return [int(index) for index in stream.indices(step - 1)]
