"""Read and write the files of precomputed latents: `index.json`, and shards.

A shard is a safetensors file with some of the samples and a checksum for each of them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokdyn.data.vae import LatentScaling
from tokdyn.errors import DataError
from tokdyn.files import replacing
from tokdyn.limits import JSON_BYTES
from tokdyn.reading import one_line, open_regular, read_bytes

INDEX = "index.json"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of the tensors of a shard, by name."""


class Rows(Protocol):
    """A tensor of a shard, some rows of which can be read."""

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Return the rows with these indices."""


class DamagedShardError(DataError):
    """Raised if the content of a shard is not what was written to it."""


class VaeIdentity(BaseModel):
    """The identity of the autoencoder that encoded latents.

    Attributes:
        kind: name of the autoencoder's class in diffusers.
        source: absolute path or hub id that it was loaded from; None if the caller passed the object itself.
        subfolder: folder below the source that was asked for; None if none was.
        sha256: hash of the weights as they were loaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    source: str | None
    subfolder: str | None
    sha256: str


class LatentOrigin(BaseModel):
    """What is needed to decode latents.

    Attributes:
        vae: the autoencoder that encoded them.
        scaling: the scaling that was applied to them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vae: VaeIdentity
    scaling: LatentScaling


class ShardEntry(BaseModel):
    """One shard in the index.

    Attributes:
        file: file name.
        count: number of samples.
        size: number of bytes of the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    count: NonNegativeInt
    size: PositiveInt


class LatentIndex(BaseModel):
    """The content of `index.json`.

    Attributes:
        format: name of this layout.
        version: version of this layout.
        fingerprint: hash of everything that the latents depend on; every shard holds the same one.
        count: number of samples, mirrored copies not counted.
        shape: (c, h, w) of a latent.
        dtype: dtype of the stored latents.
        flipped: whether the latents of mirrored images are stored as well.
        class_names: one name per label.
        image_size: (rows, columns) of the encoded images in pixels.
        posterior: whether the latents are the "mean" or a "sample" of the posterior.
        seed: seed of the posterior samples.
        scaling: scaling that was applied to the stored latents.
        vae: autoencoder that encoded them.
        shards: the shards, in the order of the samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["tokdyn-latents"] = "tokdyn-latents"
    version: Literal[1] = 1
    fingerprint: str
    count: PositiveInt
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    dtype: Literal["fp32", "fp16", "bf16"]
    flipped: bool
    class_names: tuple[str, ...]
    image_size: tuple[PositiveInt, PositiveInt]
    posterior: Literal["mean", "sample"]
    seed: int
    scaling: LatentScaling
    vae: VaeIdentity
    shards: tuple[ShardEntry, ...]

    @property
    def origin(self) -> LatentOrigin:
        """The autoencoder and the scaling of these latents."""
        return LatentOrigin(vae=self.vae, scaling=self.scaling)


def read_index(folder: Path) -> LatentIndex:
    """Read `index.json`; raise a DataError if it is missing, damaged or of another version."""
    path = folder / INDEX
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {problem}: give the path of a folder that `tokdyn features` wrote.")
    if not path.is_file():
        unfinished = any(folder.glob("shard_*.safetensors"))
        advice = (
            "run the same `tokdyn features` again to finish it" if unfinished else "write it with `tokdyn features`"
        )
        raise DataError(f"{folder} has no {INDEX}: {advice}.")
    try:
        return parse_index(path, read_bytes(path, JSON_BYTES))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}): write the latents again.") from error


def parse_index(path: object, content: bytes) -> LatentIndex:
    """Parse the content of `index.json`; raise a DataError with its path if it is damaged or of another version."""
    try:
        return LatentIndex.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'JSON'}: {first['msg']}"
        raise DataError(f"{path} is damaged or of another version ({reason}): write the latents again.") from error


def write_index(folder: Path, index: LatentIndex) -> None:
    """Write `index.json` atomically."""
    text = json.dumps(index.model_dump(mode="json"), indent=2) + "\n"
    with replacing(folder / INDEX) as half:
        half.write_text(text, encoding="utf-8")


def shard_name(number: int) -> str:
    """Return the file name of the shard with an index."""
    return f"shard_{number:05d}.safetensors"


def write_shard(path: Path, latents: Tensor, labels: Tensor, flipped: Tensor | None, fingerprint: str) -> None:
    """Write a shard atomically, so that a shard that exists is complete.

    Args:
        path: path of the file.
        latents: (n, c, h, w).
        labels: (n,) int64.
        flipped: (n, c, h, w) latents of the mirrored images, or None.
        fingerprint: hash of everything that the latents depend on.
    """
    tensors = {"latents": latents.contiguous(), "labels": labels.contiguous()}
    if flipped is not None:
        tensors["flipped"] = flipped.contiguous()
    for name in [name for name in tensors if name != "labels"]:
        sums = [checksum(row, int(label)) for row, label in zip(tensors[name], labels, strict=True)]
        tensors[f"{name}_crc32"] = torch.tensor(sums, dtype=torch.int64)
    with replacing(path) as half:
        save_file(tensors, half, {"fingerprint": fingerprint})


def open_shard(
    path: Path, dtype: str, flipped: bool, fingerprint: str, shape: tuple[int, int, int] | None = None
) -> dict[str, Tensor]:
    """Map a shard into memory and check its layout. Checksums are compared later, by `read_rows`.

    Args:
        path: path of the file.
        dtype: expected dtype of the latents: fp32, fp16 or bf16.
        flipped: whether the shard must hold the latents of mirrored images.
        fingerprint: expected fingerprint.
        shape: expected (c, h, w) of a latent; None accepts any.

    Returns:
        The tensors by name: "latents" (n, c, h, w), "labels" (n,) and "latents_crc32" (n,), with `flipped` also
        "flipped" (n, c, h, w) and "flipped_crc32" (n,). Elements are read from the file when they are used.

    Raises:
        DamagedShardError: the shard is damaged.
        DataError: the shard is missing, or belongs to other latents.
    """
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("fingerprint")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: run the same `tokdyn features` again to write it.") from error
    except Exception as error:  # a damaged or hostile header can raise anything
        raise damaged(path, one_line(error)) from error
    if owner != fingerprint:
        raise DataError(f"{path} belongs to other latents: give each run of `tokdyn features` its own folder.")
    count = len(tensors["labels"]) if "labels" in tensors else 0
    shape = tuple(tensors["latents"].shape[1:]) if shape is None and "latents" in tensors else shape or ()
    expected = expected_layout(count, shape, dtype, flipped)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if layout != expected:
        raise damaged(path, f"it holds {shown_layout(layout)} instead of {shown_layout(expected)}")
    return tensors


def expected_layout(count: int, shape: tuple[int, ...], dtype: str, flipped: bool) -> Layout:
    """Return the shape and dtype of each tensor in a shard of `count` latents (c, h, w) of a dtype."""
    expected: Layout = {"labels": ((count,), torch.int64)}
    for name in ("latents", "flipped") if flipped else ("latents",):
        expected |= {name: ((count, *shape), DTYPES[dtype]), f"{name}_crc32": ((count,), torch.int64)}
    return expected


def read_rows(path: object, tensors: Mapping[str, Rows], name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Read samples of a shard and verify their checksums.

    Args:
        path: path of the shard, for error messages.
        tensors: the tensors of the shard, from `open_shard` or a remote one.
        name: "latents" or "flipped".
        rows: (b,) int64 indices of the samples within the shard.

    Returns:
        Latents (b, c, h, w) in the stored dtype, and labels (b,).

    Raises:
        DamagedShardError: a sample does not match its checksum.
    """
    latents, labels, sums = tensors[name][rows], tensors["labels"][rows], tensors[f"{name}_crc32"][rows].tolist()
    for row, latent, label, expected in zip(rows.tolist(), latents, labels.tolist(), sums, strict=True):
        if checksum(latent, label) != expected:
            raise damaged(path, f"sample {row} does not match its checksum")
    return latents, labels


def checksum(latent: Tensor, label: int) -> int:
    """Return the CRC-32 of a contiguous latent and its label."""
    return zlib.crc32(latent.reshape(-1).view(torch.uint8).numpy().data, label & 0xFFFFFFFF)


def damaged(path: object, reason: str) -> DamagedShardError:
    """Return the error for a damaged shard."""
    return DamagedShardError(f"{path} is damaged ({reason}): delete it and run the same `tokdyn features` again.")


def shown_layout(layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    """Return the names, shapes and dtypes of tensors as text for an error message."""
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in sorted(layout.items()))
