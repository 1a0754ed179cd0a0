"""Write sharded tensors with torch.distributed.checkpoint, and read them on any number of processes.

Each process writes one safetensors file with its rows, and where they belong as JSON in the header of the file. That
takes the place of torch's own `.metadata`, which is a pickle: whoever gives a checkpoint away could run code with it.
torch.distributed.checkpoint takes a second to import, and only these functions need it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.limits import TENSORS
from tokdyn.reading import one_line

NAMES = "shard-*.safetensors"
"""The names of files of shards."""


def write(folder: Path, tensors: dict[str, Any]) -> None:
    """Write sharded tensors into a folder that all processes see. Every process calls it, with the same names.

    Args:
        folder: The folder, without shards in it.
        tensors: DTensors by name.

    Raises:
        OSError, RuntimeError: One of the processes could not write, or has ended.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first: BaseException = next(iter(error.failures.values()))[0]
        raise (first if isinstance(first, OSError | RuntimeError) else OSError(one_line(first))) from error


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the type of every tensor in a folder of shards; {} if there is no folder.

    Raises:
        CheckpointError: The shards cannot be read, or do not make whole tensors.
    """
    if not folder.is_dir():
        return {}
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
        tensors = metadata.state_dict_metadata
        if excess := TENSORS.excess(len(tensors)):
            raise ValueError(f"they are {excess}")
        found = {name: (tuple(each.size), each.properties.dtype) for name, each in tensors.items()}
        broken = [name for name, (shape, _) in found.items() if not _whole(shape, tensors[name].chunks)]
        broken += [key.fqn for key, each in metadata.storage_data.items() if each.dtype != found[key.fqn][1]]
    except Exception as error:  # a damaged header can raise anything
        raise CheckpointError(f"The shards in {folder} cannot be read: {one_line(error)}.") from error
    if broken:
        raise CheckpointError(f"The shards in {folder} do not hold all rows of {broken[0]} once, and in one type.")
    return found


def _whole(shape: tuple[int, ...], chunks: Sequence[Any]) -> bool:
    """Return whether chunks of rows, each with its offsets and sizes, make a tensor of a shape."""
    rows = 0
    for chunk in sorted((each for each in chunks if 0 not in each.sizes), key=lambda each: int(each.offsets[0])):
        if tuple(chunk.offsets) != (rows, *[0] * (len(shape) - 1)) or tuple(chunk.sizes[1:]) != shape[1:]:
            return False
        rows += chunk.sizes[0]
    return rows == shape[0]


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read shards into tensors, in place. A sharded tensor gets its rows, however many processes wrote them.

    Each process may call it by itself.

    Args:
        folder: The folder that `write` wrote into.
        tensors: Tensors or DTensors by name, on any device: all that the folder holds.

    Raises:
        CheckpointError: The shards cannot be read, or their names, shapes or types are not those of the tensors.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    check(folder, tensors)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"The shards in {folder} cannot be read: {one_line(error)}.") from error


def whole(folder: Path) -> dict[str, Tensor]:
    """Read the whole tensors of a folder of shards, on the CPU.

    Raises:
        CheckpointError: The shards cannot be read, or do not make whole tensors.
    """
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored(folder).items()}
    read(folder, tensors)
    return tensors


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and the type of every tensor; those of the whole one if it is sharded."""
    return {name: (tuple(each.shape), each.dtype) for name, each in tensors.items()}


def check(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check names, shapes and types of the tensors in a folder of shards, and that they are complete.

    Raises:
        CheckpointError: They are not those of `tensors`.
    """
    found, expected = stored(folder), shapes(tensors)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"The shards in {folder} do not belong to this recipe's model: {name} is missing, unknown or of "
                "another shape or type."
            )
