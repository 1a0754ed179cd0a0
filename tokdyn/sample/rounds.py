"""Sample the batches of a job in rounds: in each round every process samples one batch, and tells the others its cost.

A batch holds the same images whatever is missing and however many processes there are, so that its pixels stay the
same, too: that of number k holds the images from k * batch_size on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from tokdyn.diffusion.records import KeptCounts, StepRecord
from tokdyn.diffusion.sampling import Callback
from tokdyn.diffusion.settings import Sampler
from tokdyn.report.pixels import Pixels
from tokdyn.sample.costs import Batch, StepCost, step_costs
from tokdyn.sample.drawing import draw
from tokdyn.sample.job import Job
from tokdyn.sample.sinks import Sink
from tokdyn.team import Team


def batches_of(missing: Sequence[int], batch_size: int) -> list[list[int]]:
    """Divide the ascending numbers of missing images into batches."""
    return [list(batch) for _, batch in groupby(missing, key=lambda number: number // batch_size)]


def rounds(
    job: Job, team: Team, sampler: Sampler, batches: Sequence[Sequence[int]], sink: Sink, callbacks: Iterator[Callback]
) -> Iterator[tuple[list[Batch], Pixels | None]]:
    """Sample batches and write their images.

    Args:
        job: the job.
        team: the processes.
        sampler: how to sample.
        batches: the numbers of the images of each batch.
        sink: writes the images: in every process if it writes each into a file of its own, else in the first.
        callbacks: what to call after every step, for each batch of this process.

    Yields:
        For each round the batches of all processes, in their order, and the images of this process's; None if it has
        none in this round.
    """
    for number, indices in enumerate(team.rounds(batches)):
        pixels, own = None, None
        if indices is not None:
            pixels, steps = draw(job, sampler, indices, next(callbacks))
            costs = step_costs(job.model, steps, len(indices))
            own = Batch(len(indices), costs, tuple(steps) if job.config.maps else ())
            if sink.apart:
                sink.write(indices, pixels)
        told = team.exchange(None if own is None else _packed(own)) if team.count > 1 else [own]
        if not sink.apart:
            taken = batches[number * team.count :]
            for numbers, each in zip(taken, team.collect(_tensor(pixels)), strict=False):
                sink.write(numbers, each.numpy())
        yield [each if isinstance(each, Batch) else _unpacked(each) for each in told if each is not None], pixels


def _tensor(pixels: Pixels | None) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8) if pixels is None else torch.from_numpy(pixels)


def _packed(batch: Batch) -> dict[str, Any]:
    """Return a batch as JSON data."""
    records = [
        {
            **{name: getattr(each, name) for name in ("index", "timestep", "level", "guided", "seconds")},
            "counts": each.counts
            and {
                "tokens": each.counts.tokens,
                "cond": each.counts.cond.tolist(),
                "uncond": None if each.counts.uncond is None else each.counts.uncond.tolist(),
            },
        }
        for each in batch.records
    ]
    return {"images": batch.images, "costs": [each.model_dump() for each in batch.costs], "records": records}


def _unpacked(content: dict[str, Any]) -> Batch:
    """Return the batch that `_packed` has made JSON data of."""
    records = []
    for each in content["records"]:
        counts = each["counts"]
        if counts is not None:
            uncond = None if counts["uncond"] is None else torch.tensor(counts["uncond"])
            counts = KeptCounts(counts["tokens"], torch.tensor(counts["cond"]), uncond)
        records.append(StepRecord(**{**each, "counts": counts}))
    return Batch(content["images"], tuple(StepCost(**each) for each in content["costs"]), tuple(records))
