"""Read latents of `tokdyn features` from object storage or a web server, sample by sample, through the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokdyn.data.latents import LatentDataset, Part
from tokdyn.data.remote.addresses import Address
from tokdyn.data.remote.ahead import ReadAhead
from tokdyn.data.remote.cache import CachedFile, Range, bring, open_files
from tokdyn.data.remote.store import in_parallel
from tokdyn.data.shards import (
    INDEX,
    DamagedShardError,
    Layout,
    Rows,
    damaged,
    expected_layout,
    parse_index,
    shown_layout,
)
from tokdyn.errors import DataError, TokdynError
from tokdyn.limits import JSON_BYTES
from tokdyn.reading import one_line, parse_json

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}  # of safetensors
_LENGTH = 8  # bytes, in front of the header of a safetensors file


@dataclass(frozen=True)
class _Stored:
    """A tensor in a remote safetensors file, of which some rows are read at a time.

    Attributes:
        file: the file.
        start: its first byte.
        shape: its shape.
        dtype: its dtype.
    """

    file: CachedFile
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def ranges(self, rows: Tensor) -> list[Range]:
        """Return where some rows lie."""
        return [(self.file, self.start + row * self.row, self.row) for row in rows.tolist()]

    def __getitem__(self, rows: Tensor) -> Tensor:
        read = [self.file.read_at(start, length) for _, start, length in self.ranges(rows)]
        return self._tensor(b"".join(read), len(read))

    def whole(self) -> Tensor:
        """Return all of it."""
        return self._tensor(self.file.read_at(self.start, self.row * self.shape[0]), self.shape[0])

    def _tensor(self, content: bytes, count: int) -> Tensor:
        """Return bytes as `count` rows."""
        if not content:
            return torch.empty(count, *self.shape[1:], dtype=self.dtype)
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(count, *self.shape[1:])


class RemoteLatents(LatentDataset):
    """Latents like those of `LatentDataset`, in the same order and with the same checks, from an address."""

    def __init__(self, address: Address, cache: Path, cache_limit: int) -> None:
        """Read the index, and compare the sizes of all shards with it.

        Args:
            address: of the folder that `tokdyn features` wrote.
            cache: folder of the cache.
            cache_limit: bytes that it may take.

        Raises:
            DataError: a file is missing, is damaged, or does not fit into the cache.
        """
        self.folder = address
        (index,) = open_files([address / INDEX], cache, cache_limit)
        if excess := JSON_BYTES.excess(index.size):
            raise DataError(f"{index} has {excess}.")
        self._adopt(parse_index(index, index.read_at(0, index.size)))
        addresses = [address / entry.file for entry in self.index.shards]
        self.files = open_files(addresses, cache, cache_limit)
        for file, entry in zip(self.files, self.index.shards, strict=True):
            if file.size != entry.size:
                raise DamagedShardError(
                    f"{file} has {file.size} bytes instead of the {entry.size} that were written: upload it again."
                )
        self._ahead = ReadAhead(self.files)

    def read_ahead(
        self, upcoming: Callable[[], tuple[Sequence[int], Sequence[bool] | None]], share: float = 0.0
    ) -> None:
        """Begin to read samples of a later batch, and then all others; see `Dataset.read_ahead`."""

        def action() -> None:
            indices, flips = upcoming()
            self._bring(self._parts(self._checked(indices, len(self)), flips))

        self._ahead.ask(action, share)

    def _bring(self, parts: Sequence[Part]) -> None:
        """Bring samples into the cache, with several requests at the same time."""
        in_parallel([partial(self._shard, number) for number in {part.shard for part in parts} - set(self._shards)])
        stored = [(self._shard(part.shard)[part.name], part.rows) for part in parts]
        bring(each for tensor, rows in stored if isinstance(tensor, _Stored) for each in tensor.ranges(rows))

    def _read(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return samples; see `LatentDataset`. What does not match its checksum is read once more from afar."""
        try:
            return super()._read(part)
        except DamagedShardError:
            tensors = self._shards.pop(part.shard)
            for tensor in tensors.values():
                for file, start, length in tensor.ranges(part.rows) if isinstance(tensor, _Stored) else ():
                    file.forget(start, length)
            file = self.files[part.shard]
            file.forget(0, _header_end(tensors[part.name]))
            return super()._read(part)

    def _shard(self, number: int) -> Mapping[str, Rows]:
        """Return the tensors of a shard: labels and checksums are read once per process, latents on demand."""
        shard = self._shards.get(number)
        if shard is None:
            stored = self._header(number)
            shard = {key: each if key in ("latents", "flipped") else each.whole() for key, each in stored.items()}
            self._shards[number] = shard
        return shard

    def _header(self, number: int) -> dict[str, _Stored]:
        """Read the header of a shard, and require the tensors of latents in it."""
        file, entry = self.files[number], self.index.shards[number]
        try:
            length = int.from_bytes(file.read_at(0, _LENGTH), "little")
            if length > min(JSON_BYTES.value, file.size - _LENGTH):
                raise ValueError(f"its header has {length:,} bytes")
            header = parse_json(file.read_at(_LENGTH, length))
            owner = header.pop("__metadata__", {}).get("fingerprint")
            stored = {name: _stored(file, _LENGTH + length, each) for name, each in header.items()}
        except TokdynError:
            raise
        except Exception as error:  # a damaged or hostile header can raise anything
            raise damaged(file, one_line(error)) from error
        if owner != self.index.fingerprint:
            raise DataError(f"{file} belongs to other latents: upload the folder again.")
        layout: Layout = {name: (each.shape, each.dtype) for name, each in stored.items()}
        expected = expected_layout(entry.count, self.shape, self.index.dtype, self.can_flip)
        if layout != expected:
            raise damaged(file, f"it holds {shown_layout(layout)} instead of {shown_layout(expected)}")
        return stored


def _stored(file: CachedFile, begin: int, facts: Mapping[str, Any]) -> _Stored:
    """Return the tensor that an entry of a header describes; raise if it contradicts itself."""
    dtype, shape, (start, stop) = _DTYPES[facts["dtype"]], tuple(facts["shape"]), facts["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError("a shape or an offset is no number")
    if stop - start != math.prod(shape) * dtype.itemsize or begin + stop > file.size:
        raise ValueError("the size of a tensor is not that of its elements")
    return _Stored(file, begin + start, shape, dtype)


def _header_end(tensor: Rows) -> int:
    """Return the number of bytes up to the first row of a tensor, within which header, labels and checksums may lie."""
    return tensor.start if isinstance(tensor, _Stored) else 0
