"""What a playground shows while it draws, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokdyn.report.pixels import Pixels


@dataclass(frozen=True)
class Sketch:
    """An unfinished picture.

    Attributes:
        step: steps that were made, from 1.
        steps: steps of the whole picture.
        level: noise level in [0, 1]; None if it is not known.
        picture: (H, W, 3) uint8, the clean picture that the model predicts at this step, as far as that is known.
        keep: (R, C) bool, True for tokens that the conditional branch computed by themselves in this step, False for
            those that were left out or merged into others; None if all were computed, or that is not known.
    """

    step: int
    steps: int
    level: float | None
    picture: Pixels
    keep: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Drawn:
    """A finished picture and what it cost.

    Attributes:
        picture: (H, W, 3) uint8; of a video the first frame.
        keep: as in `Sketch`, in the last step that was shown.
        steps: steps that were made.
        seconds: time of the whole picture, without what was shown meanwhile.
        gflops: 1e9 FLOPs of all steps and guidance branches; a multiply-add is 2 FLOPs. None if not known.
        kept: mean kept share over steps and branches; None if every token was computed, or that is not known.
        cached: steps in which a cache skipped the blocks.
    """

    picture: Pixels
    keep: NDArray[np.bool_] | None
    steps: int
    seconds: float
    gflops: float | None
    kept: float | None
    cached: int = 0


@dataclass(frozen=True)
class Scene:
    """What is to be seen: a picture, and beside it the one from the same seed at full cost.

    Attributes:
        drawn: the picture that was asked for.
        beside: the one at full cost; None before it is begun.
    """

    drawn: Sketch | Drawn
    beside: Sketch | Drawn | None = None


Show = Callable[[Sketch | None], None]
"""Shows a sketch; or, given None, nothing. Raises `Cancelled` if nobody looks any more."""
