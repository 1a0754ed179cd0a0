"""Draw one picture after the other with a model, and show what it makes meanwhile: the model's half of the page."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tokdyn.cost import TrajectoryStats
from tokdyn.playground.scene import Drawn, Scene, Show
from tokdyn.playground.settings import Wanted
from tokdyn.playground.streaming import streamed


@dataclass(frozen=True)
class Offer:
    """What a page offers for a model, and what it begins with.

    Attributes:
        title: name of the model.
        what: what a subject is, "class" or "prompt".
        subjects: classes or prompts to choose from; any other text is a prompt too.
        budgets: whether kept tokens can be dropped.
        counted: what the FLOPs are those of.
        full: name of the picture at full cost.
        begin: what the page begins with.
    """

    title: str
    what: str
    subjects: tuple[str, ...]
    budgets: bool
    counted: str
    full: str
    begin: Wanted


class Studio(Protocol):
    """A model that draws.

    Attributes:
        offer: what can be asked for.
        alone: held while a picture is drawn, and until the model is as before.
    """

    offer: Offer
    alone: threading.Lock

    def draw(self, wanted: Wanted, show: Show) -> Drawn:
        """Draw a picture. The model is as before when this ends, also by an error.

        Raises:
            TokdynError: it cannot be drawn.
            Cancelled: nobody looks any more.
        """


def scenes(studio: Studio, wanted: Wanted) -> Generator[Scene, None, None]:
    """Draw a picture, then the one from the same seed at full cost, and yield what is to be seen meanwhile.

    Of a studio only one picture is drawn at a time. Closing the iterator cancels it.

    Raises:
        TokdynError: it cannot be drawn.
    """

    def work(send: Any) -> None:
        drawn = studio.draw(wanted, lambda sketch: send(None if sketch is None else Scene(sketch)))
        if not wanted.reduces:
            send(Scene(drawn, drawn))
            return
        send(Scene(drawn))
        full = studio.draw(wanted.at_full_cost, lambda sketch: send(None if sketch is None else Scene(drawn, sketch)))
        send(Scene(drawn, full))

    yield from streamed(work, studio.alone)


def chosen_steps(steps: int, shown: int) -> frozenset[int]:
    """Return which steps, counted from 0, are shown: so many, spread evenly, the first and the last included."""
    return frozenset(torch.linspace(0, steps - 1, min(shown, steps)).round().long().tolist())


def cached_steps(found: TrajectoryStats) -> int:
    """Count the steps in which a cache skipped the blocks of every call."""
    return sum(all(call.cached for call in step.calls) for step in found.steps)
