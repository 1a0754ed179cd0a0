"""Read the latents that `tokdyn features` wrote, as a memory-mapped data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.data.base import Dataset
from tokdyn.data.shards import DamagedShardError, LatentIndex, Rows, open_shard, read_index, read_rows
from tokdyn.errors import DataError
from tokdyn.files import user_path


@dataclass(frozen=True)
class Part:
    """The samples of a batch that lie in one tensor of one shard.

    Attributes:
        shard: number of the shard.
        name: "latents" or "flipped".
        places: (b,) their places in the batch.
        rows: (b,) int64, their rows in the tensor.
    """

    shard: int
    name: str
    places: NDArray[np.int64]
    rows: Tensor


class LatentDataset(Dataset):
    """Latents that `tokdyn features` wrote, already scaled as model inputs.

    The files are mapped into memory: a sample is read when it is requested, and then compared with its checksum.

    Attributes:
        folder: folder of the latents.
        index: content of index.json, which names the autoencoder and the scaling.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the index and check the size and layout of every shard.

        Args:
            folder: the `out` of `tokdyn features`.

        Raises:
            DataError: a file is missing, is damaged, or belongs to other latents.
        """
        self.folder: Any = user_path(folder)
        self._adopt(read_index(self.folder))
        for number in range(len(self.index.shards)):
            self._shard(number)

    def _adopt(self, index: LatentIndex) -> None:
        """Take over what the index says; raise a DataError if it contradicts itself."""
        self.index = index
        self.shape = self.index.shape
        self.class_names = self.index.class_names
        self.can_flip = self.index.flipped
        self._ends = np.cumsum([shard.count for shard in self.index.shards])
        self._shards: dict[int, Mapping[str, Rows]] = {}
        if not len(self._ends) or self._ends[-1] != self.index.count:
            raise DataError(f"{self.folder}: the shards do not add up to {self.index.count} samples: write them again.")

    def __len__(self) -> int:
        """Number of samples, mirrored copies not counted."""
        return self.index.count

    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Read latents; see `Dataset.fetch`. A mirrored sample is the stored latent of the mirrored image."""
        wanted = self._checked(indices, len(self))
        parts = self._parts(wanted, flips)
        samples = torch.empty(len(wanted), *self.shape)
        labels = torch.empty(len(wanted), dtype=torch.int64)
        self._bring(parts)
        for part in parts:
            latents, latent_labels = self._read(part)
            samples[part.places], labels[part.places] = latents.float(), latent_labels
        return samples, labels, wanted.tolist()

    def identity(self) -> dict[str, object]:
        """See `Dataset.identity`."""
        return {"kind": "latents", "fingerprint": self.index.fingerprint, "count": self.index.count}

    def _parts(self, wanted: NDArray[np.int64], flips: Sequence[bool] | None) -> list[Part]:
        """Divide samples by the tensors of shards that hold them or their mirrored copies."""
        flipped = np.zeros(len(wanted), dtype=np.bool_) if flips is None else np.asarray(flips, dtype=np.bool_)
        if flipped.any():
            self.require_flip()
        shards = np.searchsorted(self._ends, wanted, side="right")
        parts = []
        for number, flip in {*zip(shards.tolist(), flipped.tolist(), strict=True)}:
            places = np.flatnonzero((shards == number) & (flipped == flip))
            rows = torch.from_numpy(wanted[places] - (self._ends[number] - self.index.shards[number].count))
            parts.append(Part(number, "flipped" if flip else "latents", places, rows))
        return parts

    def _bring(self, parts: Sequence[Part]) -> None:
        """Bring samples here, if they are remote."""

    def _read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return latents (b, c, h, w) and labels (b,) of a shard, compared with their checksums."""
        entry = self.index.shards[part.shard]
        return read_rows(self.folder / entry.file, self._shard(part.shard), part.name, part.rows)

    def _shard(self, number: int) -> Mapping[str, Rows]:
        """Return the tensors of a shard, which is opened once per process."""
        if number not in self._shards:
            entry, index = self.index.shards[number], self.index
            path = self.folder / entry.file
            shard = open_shard(path, index.dtype, self.can_flip, index.fingerprint, self.shape)
            if len(shard["labels"]) != entry.count or path.stat().st_size != entry.size:
                raise DamagedShardError(
                    f"{path} does not hold the {entry.count} samples that were written ({path.stat().st_size} bytes "
                    f"instead of {entry.size}): delete it and run the same `tokdyn features` again."
                )
            self._shards[number] = shard
        return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}
