"""Prepare the micro-batches of a training step, so that its result does not depend on how its batch is divided.

What is drawn for an image belongs to (seed, step, place in the batch of the step). Two losses need means over several
images: the ratio loss over its groups, and the FLOPs loss of DynamicWidth over the batch. Processes exchange them in
the forward pass. Where they span micro-batches that come one after the other, a survey first computes all micro-batches
without their gradients, because each backward pass needs the means of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from tokdyn.division import BatchPart, Means, computing
from tokdyn.ops.routing import group_means
from tokdyn.seeds import Stream, image_keys, seed_everything
from tokdyn.train import schedule
from tokdyn.train.setup import Run
from tokdyn.train.step import Draws, RatioTerm, autocast, draw, kept_share, micro_step
from tokdyn.upcycling.phases import PhaseBatch, count_steps

Images = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B,) of a micro-batch."""


@dataclass(frozen=True)
class MicroBatch:
    """The part of a step's batch that one process computes at once.

    Attributes:
        draws: Noisy images and all that was drawn for them, on the device.
        phase_batch: The phase of an upcycling run, and the samples on its fixed plan.
        part: Tells the model what it computes, while `tokdyn.division.computing` is open.
        tail_drop: Mean tail drop.
        last: Whether it is the last one of the step.
    """

    draws: Draws
    phase_batch: PhaseBatch | None
    part: BatchPart
    tail_drop: float
    last: bool


class Division:
    """The division of every batch of a run into the micro-batches of its processes.

    Args:
        run: The run.

    Attributes:
        spans: Whether a loss needs a mean over images of several micro-batches that come one after the other.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        training, chunking, upcycle = run.recipe.training, run.recipe.chunking, run.recipe.upcycle
        self._batch, self._accumulation = training.batch_size, training.accumulation
        self._methods = upcycle is not None and bool(upcycle.methods)
        groups = [] if chunking is None else [self._size(chunking.ratio_group)]
        groups += [self._batch] if self._methods else []
        together = run.micro_batch * run.stream.world
        self.spans = self._accumulation > 1 and any(run.micro_batch % size and together % size for size in groups)
        self._surveyed: Mapping[str, Tensor] = {}

    def micro_batches(self, step: int, batches: Iterator[Images], chunking: RatioTerm | None) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step, in the order in which this process computes them.

        Args:
            step: Steps already taken.
            batches: Yields images and labels.
            chunking: The settings of the ratio loss, for chunking models.
        """
        inputs: Iterable[Images] = islice(batches, self._accumulation)
        if self.spans:
            inputs = list(inputs)
            self._surveyed = self._survey(step, inputs, chunking)
        for micro, (x, labels) in enumerate(inputs):

            def means(name: str, values: Tensor, group: int | None, micro: int = micro) -> Tensor:
                return self._means(micro, name, values, group)

            yield self._prepare(step, micro, x, labels, means)

    def _prepare(self, step: int, micro: int, x: Tensor, labels: Tensor, means: Means) -> MicroBatch:
        """Draw all that belongs to the images of a micro-batch."""
        run, recipe, device = self.run, self.run.recipe, self.run.accelerator.device
        slot, count = run.slot(micro), run.micro_batch
        first = slot * count
        seed_everything(recipe.seed, Stream.MICRO_STEP, step, slot)  # for methods that draw from torch's generator
        keys = image_keys(recipe.seed, step, first, count).to(device, non_blocking=True)
        tail: float | Tensor = 0.0
        if recipe.chunking is not None:
            tail = schedule.tail_drop(recipe.chunking, recipe.seed, step, first, count)
        x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        null, dropout = run.trainee.model.config.num_classes, recipe.training.label_dropout
        draws = draw(recipe.objective, x, labels, null, dropout, keys, tail)
        phase_batch = None
        if recipe.upcycle is not None:
            phase_batch = PhaseBatch.draw(recipe.upcycle, recipe.seed, step, first, count)
            if self._methods:
                count_steps(run.trainee.model, step)
        dropped = float(torch.as_tensor(tail).mean())
        return MicroBatch(draws, phase_batch, BatchPart(keys, means), dropped, micro == self._accumulation - 1)

    def _survey(self, step: int, inputs: Sequence[Images], chunking: RatioTerm | None) -> dict[str, Tensor]:
        """Compute the quantities whose means span micro-batches, for all images of the batch, in the order of places.

        The router alone is enough for the ratio loss. With methods, the student runs as in training, so that it draws
        and decides the same, but nothing is compared with a teacher.
        """
        run, noted = self.run, defaultdict[str, list[Tensor]](list)
        objective, precision = run.recipe.objective, run.recipe.training.precision

        def note(name: str, values: Tensor, group: int | None) -> Tensor:
            noted[name].append(values)
            return values

        for micro, (x, labels) in enumerate(inputs):
            batch = self._prepare(step, micro, x, labels, note)
            noised, phase_batch = batch.draws.noised, batch.phase_batch
            with computing(batch.part):
                if self._methods and phase_batch is not None:
                    alone = phase_batch.phase.model_copy(update={"teacher": 0.0, "output": 0.0, "complete": 0.0})
                    called = run.accelerator.unwrap_model(run.wrapped)
                    micro_step(called, objective, batch.draws, precision, chunking, replace(phase_batch, phase=alone))
                else:
                    with autocast(noised.x_t.device, precision):
                        routing = run.trainee.model.route(noised.x_t, noised.timestep, batch.draws.labels)
                    kept_share(routing, None)
        return {name: self._in_order(torch.stack(values)) for name, values in noted.items()}

    def _in_order(self, values: Tensor) -> Tensor:
        """Gather values (micro-batches, B) of all processes, and return them in the order of places in the batch."""
        gathered: Tensor = self.run.accelerator.gather(values[None])
        return gathered.transpose(0, 1).flatten()

    def _means(self, micro: int, name: str, values: Tensor, group: int | None) -> Tensor:
        """Return the means of the groups of images in micro-batch `micro`; see `tokdyn.division.Means`."""
        size, count, stream = self._size(group), len(values), self.run.stream
        if count % size == 0:
            return group_means(values, size)
        if name in self._surveyed:
            values, first = self._surveyed[name], self.run.slot(micro) * count
        else:
            values, first = self.run.accelerator.gather(values), stream.rank * count
        return group_means(values, size)[first : first + count]

    def _size(self, group: int | None) -> int:
        """Return the number of images in a group."""
        return min(group or self._batch, self._batch)
