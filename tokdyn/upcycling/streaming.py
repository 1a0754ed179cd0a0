"""Draw images while a transformer is trained, so that it learns from ever new calls and few have to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from tokdyn.attach import attachment_of, disabled
from tokdyn.pipelines.drawing import draw
from tokdyn.recorder import Call, evaluating, recording


class DrawnCalls:
    """The calls of images that a pipeline draws when a training step needs them, as `distil` takes them.

    Every place of a step has an image of its own, which serves for some steps. The images depend on their number alone,
    so that a resumed run, and one in other processes, gets the same.

    Args:
        pipe: The pipeline. Its transformer is the student, whose methods and LoRA are disabled while it draws, or the
            original model.
        prompts: Arguments of its calls, one for each prompt, which take turns.
        calls: Calls per step, over all processes.
        steps: Steps for which an image serves.
        seed: Seed of the noise of the first image; the next one has the next seed.
    """

    def __init__(self, pipe: Any, prompts: Sequence[Mapping[str, Any]], calls: int, steps: int, seed: int) -> None:
        self._pipe, self._prompts, self._calls, self._steps, self._seed = pipe, prompts, calls, steps, seed
        self._round = -1
        self._drawn: dict[int, list[Call]] = {}

    def __call__(self, step: int, slot: int) -> Sequence[Call]:
        """Return the calls of the image that serves for a place of a step."""
        if step // self._steps != self._round:
            self._round, self._drawn = step // self._steps, {}
        if slot not in self._drawn:
            self._drawn[slot] = self._draw(self._round * self._calls + slot)
        return self._drawn[slot]

    def _draw(self, number: int) -> list[Call]:
        model: nn.Module = self._pipe.transformer
        original = nullcontext() if attachment_of(model) is None else disabled(model)
        with evaluating(model), original, recording(model) as calls:
            draw(self._pipe, self._prompts[number % len(self._prompts)], self._seed + number)
        return calls
