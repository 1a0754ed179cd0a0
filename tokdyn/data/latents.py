"""Read the latents that `tokdyn features` wrote, as a memory-mapped data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokdyn.data.base import Dataset
from tokdyn.data.shards import DamagedShardError, LatentIndex, open_shard, read_index, read_rows
from tokdyn.errors import DataError
from tokdyn.files import user_path


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
        self.folder = user_path(folder)
        self.index: LatentIndex = read_index(self.folder)
        self.shape = self.index.shape
        self.class_names = self.index.class_names
        self.can_flip = self.index.flipped
        self._ends = np.cumsum([shard.count for shard in self.index.shards])
        self._shards: dict[int, dict[str, Tensor]] = {}
        if not len(self._ends) or self._ends[-1] != self.index.count:
            raise DataError(f"{self.folder}: the shards do not add up to {self.index.count} samples: write them again.")
        for number in range(len(self.index.shards)):
            self._shard(number)

    def __len__(self) -> int:
        """Number of samples, mirrored copies not counted."""
        return self.index.count

    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Read latents; see `Dataset.fetch`. A mirrored sample is the stored latent of the mirrored image."""
        wanted = self._checked(indices, len(self))
        flipped = np.zeros(len(wanted), dtype=np.bool_) if flips is None else np.asarray(flips, dtype=np.bool_)
        if flipped.any():
            self.require_flip()
        samples = torch.empty(len(wanted), *self.shape)
        labels = torch.empty(len(wanted), dtype=torch.int64)
        shards = np.searchsorted(self._ends, wanted, side="right")
        for number, flip in {*zip(shards.tolist(), flipped.tolist(), strict=True)}:
            places = np.flatnonzero((shards == number) & (flipped == flip))
            entry = self.index.shards[number]
            rows = torch.from_numpy(wanted[places] - (self._ends[number] - entry.count))
            latents, latent_labels = read_rows(
                self.folder / entry.file, self._shard(number), "flipped" if flip else "latents", rows
            )
            samples[places], labels[places] = latents.float(), latent_labels
        return samples, labels, wanted.tolist()

    def identity(self) -> dict[str, object]:
        """See `Dataset.identity`."""
        return {"kind": "latents", "fingerprint": self.index.fingerprint, "count": self.index.count}

    def _shard(self, number: int) -> dict[str, Tensor]:
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
