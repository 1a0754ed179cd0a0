"""Run an extractor over a set of images, in batches of images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.data.decode import quiet
from tokdyn.errors import CheckpointError, DataError
from tokdyn.evaluate.extractor import Extractor, Outputs
from tokdyn.evaluate.images import ImageSet, Labels, Pixels
from tokdyn.progress import progress
from tokdyn.team import ALONE, Team

_BATCHES_HELD = 4  # of so many batches, images wait for more of their size before an incomplete batch is run


@dataclass(frozen=True)
class Extracted:
    """Outputs of an extractor for a set of images.

    Attributes:
        features: (N, F) float32.
        logits: (N, C) float32 or None.
        labels: Labels of the N images, or None.
        image_size: (rows, columns) of the extractor's inputs, or None if they differed.
        unreadable: Error messages of images that could not be read and were left out.
    """

    features: Tensor
    logits: Tensor | None
    labels: Labels | None
    image_size: tuple[int, int] | None
    unreadable: tuple[str, ...]


def choose(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return the indices of all `count` images, or of `limit` random ones, in ascending order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def extract(
    title: str,
    images: ImageSet,
    indices: NDArray[np.int64],
    extractor: Extractor,
    batch_size: int,
    on_error: Literal["raise", "skip"],
    team: Team = ALONE,
) -> Extracted | None:
    """Run an extractor over some images of a set, and show the progress.

    The images are divided into stretches of a few batches, which the processes take in turn. A batch lies within a
    stretch, so that the same images are computed together, and get the same features, in any number of processes.

    Args:
        title: Name of the work.
        images: The set of images.
        indices: Ascending indices of the images.
        extractor: The network.
        batch_size: Images per call of the network.
        on_error: Whether to raise the error of an image that cannot be read, or to leave the image out.
        team: The processes that call this function with the same arguments.

    Returns:
        One row per image that could be read, in the order of `indices`; None outside the first process.

    Raises:
        DataError: An image cannot be read and `on_error` is "raise", or fewer than two images can be read.
        CheckpointError: The network fails on the images, or returns something other than features and logits.
    """
    length = _BATCHES_HELD * batch_size
    stretches = [range(start, min(start + length, len(indices))) for start in range(0, len(indices), length)]
    mine = [row for stretch in team.share(stretches) for row in stretch]
    rows = _Rows(len(indices))
    waiting: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
    unreadable: list[tuple[int, str]] = []
    sizes: set[tuple[int, ...]] = set()
    with quiet(), progress(title, len(mine)) as advance:

        def run(shape: tuple[int, ...]) -> None:
            batch = waiting.pop(shape)
            stacked = torch.from_numpy(np.stack([image for _, image in batch]))
            outputs = extractor(rearrange(stacked, "b h w c -> b c h w").contiguous())
            rows.write([row for row, _ in batch], outputs, extractor.info.name)
            advance(len(batch))

        for row, image in zip(mine, images.images(indices[mine].tolist(), extractor.info.input_size), strict=True):
            if isinstance(image, DataError):
                if on_error == "raise":
                    raise image
                unreadable.append((row, str(image)))
                advance(1)
            else:
                sizes.add(image.shape)
                waiting.setdefault(image.shape, []).append((row, image))
                if len(waiting[image.shape]) == batch_size:
                    run(image.shape)
            if (row + 1) % length == 0 or row == mine[-1]:
                for shape in list(waiting):
                    run(shape)
    rows.collect(team, extractor.info.name)
    told = team.exchange([sorted(sizes), unreadable])
    if not team.first:
        return None
    written = rows.written()
    messages = [message for _, message in sorted(each for _, some in told for each in map(tuple, some))]
    if len(written) < 2:
        raise DataError(f"Fewer than two of the {len(indices)} images in {images.path} can be read: {messages[-1]}")
    features, logits = rows.finished()
    labels = None if images.labels is None else images.labels.at(indices[written.numpy()])
    shapes = {tuple(shape) for some, _ in told for shape in some}
    (size,) = shapes if len(shapes) == 1 else (None,)
    return Extracted(features, logits, labels, None if size is None else (size[0], size[1]), tuple(messages))


class _Rows:
    """A matrix of features and one of logits, whose rows are written batch by batch in any order."""

    def __init__(self, count: int) -> None:
        self._written = torch.zeros(count, dtype=torch.bool)
        self._features: Tensor | None = None
        self._logits: Tensor | None = None

    def write(self, rows: Sequence[int], outputs: Outputs, name: str) -> None:
        """Write the outputs of a batch into the given rows.

        Raises:
            CheckpointError: The outputs have another width than those of the first batch; `name` is the network's.
        """
        count = len(self._written)
        if self._features is None:
            self._features = torch.empty(count, outputs.features.shape[1])
            self._logits = None if outputs.logits is None else torch.empty(count, outputs.logits.shape[1])
        for held, new in ((self._features, outputs.features), (self._logits, outputs.logits)):
            if (held is None) != (new is None) or (
                held is not None and new is not None and held.shape[1:] != new.shape[1:]
            ):
                raise CheckpointError(
                    f"{name} returned rows of another width for images of another size: set input_size, so that all "
                    "images have one size."
                )
            if held is not None and new is not None:
                held[list(rows)] = new
        self._written[list(rows)] = True

    def collect(self, team: Team, name: str) -> None:
        """Write the rows of all processes into those of the first one.

        Raises:
            CheckpointError: Processes have outputs of another width; `name` is the network's.
        """
        if team.count == 1:
            return
        own, nothing = self.written(), torch.empty(0)
        kept = [nothing if held is None else held[own] for held in (self._features, self._logits)]
        for rows, features, logits in zip(*map(team.collect, [own, *kept]), strict=True):
            if len(rows):
                self.write(rows.tolist(), Outputs(features, logits if len(logits) else None), name)

    def written(self) -> Tensor:
        """Return the ascending indices of the rows that were written."""
        return self._written.nonzero()[:, 0]

    def finished(self) -> tuple[Tensor, Tensor | None]:
        """Return the features and logits of the rows that were written."""
        if self._features is None:
            raise DataError("No image could be read: give at least two readable ones.")
        written = self.written()
        if len(written) == len(self._written):
            return self._features, self._logits
        return self._features[written], None if self._logits is None else self._logits[written]
