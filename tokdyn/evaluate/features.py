"""Run an extractor over a set of images, in batches of images of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

_BATCHES_HELD = 4  # so many batches of images may wait for more of their size before an incomplete batch is run


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
    images: ImageSet,
    indices: NDArray[np.int64],
    extractor: Extractor,
    batch_size: int,
    on_error: Literal["raise", "skip"],
    advance: Callable[[int], None],
) -> Extracted:
    """Run an extractor over some images of a set.

    Args:
        images: The set of images.
        indices: Ascending indices of the images.
        extractor: The network.
        batch_size: Images per call of the network.
        on_error: Whether to raise the error of an image that cannot be read, or to leave the image out.
        advance: Called with the number of images finished since its last call.

    Returns:
        One row per image that could be read, in the order of `indices`.

    Raises:
        DataError: An image cannot be read and `on_error` is "raise", or fewer than two images can be read.
        CheckpointError: The network fails on the images, or returns something other than features and logits.
    """
    rows = _Rows(len(indices))
    waiting: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
    unreadable: list[str] = []

    def run(shape: tuple[int, ...]) -> None:
        batch = waiting.pop(shape)
        stacked = torch.from_numpy(np.stack([image for _, image in batch]))
        outputs = extractor(rearrange(stacked, "b h w c -> b c h w").contiguous())
        rows.write([row for row, _ in batch], outputs, extractor.info.name)
        advance(len(batch))

    sizes: set[tuple[int, ...]] = set()
    with quiet():
        for row, image in enumerate(images.images(indices.tolist(), extractor.info.input_size)):
            if isinstance(image, DataError):
                if on_error == "raise":
                    raise image
                unreadable.append(str(image))
                advance(1)
                continue
            sizes.add(image.shape)
            waiting.setdefault(image.shape, []).append((row, image))
            if len(waiting[image.shape]) == batch_size:
                run(image.shape)
            elif sum(map(len, waiting.values())) > _BATCHES_HELD * batch_size:
                run(max(waiting, key=lambda shape: len(waiting[shape])))
    for shape in list(waiting):
        run(shape)
    written = rows.written()
    if len(written) < 2:
        raise DataError(f"Fewer than two of the {len(indices)} images in {images.path} can be read: {unreadable[-1]}")
    features, logits = rows.finished()
    labels = None if images.labels is None else images.labels.at(indices[written.numpy()])
    (size,) = sizes if len(sizes) == 1 else (None,)
    return Extracted(features, logits, labels, None if size is None else (size[0], size[1]), tuple(unreadable))


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
