"""Runs an extractor over a set of images."""

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

_BATCHES_HELD = 4  # so many batches of images may wait for others of their size before an incomplete batch is run


@dataclass(frozen=True)
class Extracted:
    """Outputs of an extractor for a set of images.

    Attributes:
        features: (N, F) float32.
        logits: (N, C) float32 or None.
        labels: Labels of the N images, or None.
        image_size: (rows, columns) of the extractor's inputs, or None if they differed.
        unreadable: Error messages of images that were left out.
    """

    features: Tensor
    logits: Tensor | None
    labels: Labels | None
    image_size: tuple[int, int] | None
    unreadable: tuple[str, ...]


def choose(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Return ascending positions of all `count` images, or of `limit` of them drawn at random without replacement."""
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
    """Run the extractor over the images at `indices`, in batches of one image size; rows keep the order of `indices`.

    Args:
        images: The set of images.
        indices: Ascending positions in the set.
        extractor: The network.
        batch_size: Images per call of the network.
        on_error: What to do about an image that cannot be read.
        advance: Called with the number of images finished since its last call.

    Raises:
        DataError: An image cannot be read, or fewer than two can.
        CheckpointError: The network does not take the images, or breaks its contract.
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
    kept = rows.kept()
    if len(kept) < 2:
        raise DataError(f"Fewer than two of the {len(indices)} images in {images.path} can be read: {unreadable[-1]}")
    features, logits = rows.finished()
    labels = None if images.labels is None else images.labels.at(indices[kept.numpy()])
    (size,) = sizes if len(sizes) == 1 else (None,)
    return Extracted(features, logits, labels, None if size is None else (size[0], size[1]), tuple(unreadable))


class _Rows:
    """Rows of features and logits, written batch by batch in any order."""

    def __init__(self, count: int) -> None:
        self._written = torch.zeros(count, dtype=torch.bool)
        self._features: Tensor | None = None
        self._logits: Tensor | None = None

    def write(self, rows: Sequence[int], outputs: Outputs, name: str) -> None:
        """Write a batch into its rows; every batch must be as wide as the first."""
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

    def kept(self) -> Tensor:
        """Return the ascending positions of the rows written."""
        return self._written.nonzero()[:, 0]

    def finished(self) -> tuple[Tensor, Tensor | None]:
        """Return features and logits of the rows written."""
        if self._features is None:
            raise DataError("No image could be read: give at least two readable ones.")
        kept = self.kept()
        if len(kept) == len(self._written):
            return self._features, self._logits
        return self._features[kept], None if self._logits is None else self._logits[kept]
