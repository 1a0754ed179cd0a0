"""Show the schedules that `tokdyn tune` tried, each with some of the images that it drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tokdyn.bench.tune_search import LEVELS, Drawn, Trial
from tokdyn.report.gallery import Column, side_by_side
from tokdyn.report.html import Html, join, tag
from tokdyn.report.pixels import Pixels

TITLE = "Schedules that were tried"
_MOST = 24  # schedules on the page


def trial_cards(
    reference: Drawn, trials: Sequence[Trial], to_pixels: Callable[[tuple[Tensor, ...]], Sequence[Pixels]]
) -> Html:
    """Return a row for each schedule: its error, FLOPs and knobs, and images from the same seeds as in all rows.

    Args:
        reference: what the unmodified model drew; the first row.
        trials: the schedules, the lowest error first; the first 24 are shown.
        to_pixels: converts the images of a row, as in `Drawn.shown`.
    """
    rows = [to_pixels(reference.shown), *(to_pixels(trial.shown) for trial in trials[:_MOST])]
    columns = [Column(f"image {place + 1}", (), images) for place, images in enumerate(zip(*rows, strict=True))]
    names = ["unmodified", *(f"schedule {place + 1}" for place in range(len(rows) - 1))]
    left_out = f" The {_MOST} with the lowest errors of {len(trials)} are shown." if len(trials) > _MOST else ""
    levels = ", ".join(f"{level:g}" for level in LEVELS)
    legend = (
        "The error is the squared distance to the images of the unmodified model from the same seeds, over their "
        f"variance. A knob is turned between 0 and 1, at the noise levels {levels} or as a whole.{left_out}"
    )
    notes = ["100.0% of the FLOPs", *map(_note, trials[:_MOST])]
    return join([tag("p", legend, class_="note"), side_by_side(columns, names, notes)])


def _note(trial: Trial) -> str:
    """Write what a schedule costs, how far its images are from those of the unmodified model, and its knobs."""
    knobs = (f"{knob} {' '.join(f'{value:.2f}' for value in values)}" for knob, values in trial.turned.items())
    return f"{trial.flops:.1%} of the FLOPs, error {trial.error:.4f}; {', '.join(knobs)}"
