"""Draw one batch of the images of a sampling job, as pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokdyn.diffusion.records import StepRecord
from tokdyn.diffusion.sampling import Callback, generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import CheckpointError, InputError
from tokdyn.report.pixels import Pixels
from tokdyn.sample.job import Job


def draw(
    job: Job, sampler: Sampler, indices: Sequence[int], callback: Callback | None
) -> tuple[Pixels, list[StepRecord]]:
    """Draw some images of a job.

    Args:
        job: the job.
        sampler: how to sample.
        indices: numbers of the images, which decide their labels and seeds.
        callback: called after every step; None for nothing.

    Returns:
        The images (N, H, W, 3) uint8, and the records of the steps.

    Raises:
        InputError: the images do not fit into memory.
        CheckpointError: the model generates values that are not finite.
    """
    labels, seeds = job.labels, [job.config.seed + index for index in indices]
    try:
        made = generate(
            job.model, sampler, job.objective, [labels[index] for index in indices], seeds, callback=callback,
            dtype=job.dtype,
        )  # fmt: skip
        if not torch.isfinite(made.images).all():
            raise CheckpointError(
                f"{job.info.path} generates values that are not finite (precision {job.precision}): check its "
                "weights, or lower guidance."
            )
        return job.decoder(made.images), made.steps
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{len(indices)} images do not fit into the memory of {job.device}: lower batch_size."
        ) from error
