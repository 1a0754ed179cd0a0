"""Encode a data set once, so that training reads latents instead of images (`tokdyn features`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from tokdyn.data.base import Dataset
from tokdyn.data.encoding import Encoder, encode_parts
from tokdyn.data.factory import open_data
from tokdyn.data.features_config import FeaturesConfig
from tokdyn.data.shards import (
    DTYPES,
    INDEX,
    DamagedShardError,
    LatentIndex,
    ShardEntry,
    VaeIdentity,
    open_shard,
    read_index,
    shard_name,
    write_index,
    write_shard,
)
from tokdyn.data.vae import LatentScaling, load_vae, quiet_diffusers, scaling_of, weights_digest
from tokdyn.errors import DataError
from tokdyn.files import require_folder, user_path
from tokdyn.host import open_device, settle_memory
from tokdyn.progress import progress
from tokdyn.team import ALONE, Team


@dataclass(frozen=True)
class FeaturesReport:
    """The result of `write_features`.

    Attributes:
        out: folder of the latents.
        count: number of samples, mirrored copies not counted.
        skipped: number of unreadable images that were left out.
        shape: (c, h, w) of a latent.
        shards: number of files.
        resumed: number of files that existed already.
        size: bytes of all files.
    """

    out: Path
    count: int
    skipped: int
    shape: tuple[int, int, int]
    shards: int
    resumed: int
    size: int


def write_features(
    config: FeaturesConfig, vae: nn.Module | None = None, dataset: Dataset | None = None, team: Team = ALONE
) -> FeaturesReport:
    """Encode a data set into latents that `LatentDataset` reads.

    Each shard, a file of latents, is written to a temporary file and renamed, and `index.json` is written last. After
    an interruption the same call writes the missing shards, and the files are the same as without the interruption.

    Args:
        config: the settings.
        vae: autoencoder to use in place of `config.vae`; it keeps its device and dtype.
        dataset: images to encode in place of `config.data`.
        team: processes that call this function with the same arguments, each of which writes a share of the shards.
            The files are those that one process writes.

    Returns:
        What was written, the same in all processes.

    Raises:
        DataError: the images or the autoencoder cannot be used, or the folder holds other latents.
        OutputError: the folder is in use, or cannot be written to.
    """
    settle_memory()
    folder = user_path(config.out)
    require_folder(folder)
    dataset = open_data(config.data) if dataset is None else dataset
    with team.after_first():
        vae, source = _autoencoder(config, vae)
    channels = cast(Any, vae).config.get("in_channels")
    if channels is not None and channels != dataset.shape[0]:
        raise DataError(
            f"{type(vae).__name__} takes images with {channels} channels, but these have {dataset.shape[0]}: set "
            f"channels={channels} or use another autoencoder."
        )
    encoder = Encoder(vae, _scaling(config, vae), config.posterior, config.seed, config.dtype)
    starts = range(0, len(dataset), config.shard_size)
    parts = [range(start, min(start + config.shard_size, len(dataset))) for start in starts]
    paths = [folder / shard_name(number) for number in range(len(parts))]
    team.agree("autoencoder, images or other settings", [config.model_dump(mode="json"), source.sha256, len(dataset)])
    with team.owning(folder):
        told: tuple[str, list[int]] = ("", [])
        if team.first:
            told = _begun(folder, paths, config, encoder, source, dataset)
        fingerprint, complete = team.from_first(told)
        missing = team.share(sorted(set(range(len(parts))) - set(complete)))
        with progress(f"Encoding to {folder.name}", sum(len(parts[number]) for number in missing)) as advance:
            settings = (config.batch_size, config.flip, config.workers)
            for number, part in encode_parts(encoder, dataset, [parts[each] for each in missing], *settings, advance):
                write_shard(paths[missing[number]], *part, fingerprint)
        team.exchange(None)  # all shards are there
        index = _index(paths, config, encoder, source, dataset, fingerprint)
        if team.first:
            write_index(folder, index)
    return FeaturesReport(
        folder, index.count, len(dataset) - index.count, index.shape, len(index.shards), len(complete),
        sum(entry.size for entry in index.shards),
    )  # fmt: skip


def _begun(
    folder: Path, paths: Sequence[Path], config: FeaturesConfig, encoder: Encoder, source: VaeIdentity, dataset: Dataset
) -> tuple[str, list[int]]:
    """Return the fingerprint of the latents, and the numbers of the shards that are complete.

    Raises:
        DataError: the folder holds other latents.
    """
    fingerprint = _fingerprint(config, encoder, source, dataset.identity())
    named = {key: value for key, value in dataset.identity().items() if key != "content"}
    earlier = _fingerprint(config, encoder, source, named)  # of versions that looked at the names of files alone
    if _was_begun(folder, paths, config, earlier):
        fingerprint = earlier
    if (folder / INDEX).exists() and read_index(folder).fingerprint != fingerprint:
        raise DataError(
            f"{folder} holds latents that were made from other images or settings: choose another out, or delete the "
            "folder."
        )
    return fingerprint, [number for number, path in enumerate(paths) if _is_complete(path, config, fingerprint)]


def _index(
    paths: Sequence[Path],
    config: FeaturesConfig,
    encoder: Encoder,
    source: VaeIdentity,
    dataset: Dataset,
    fingerprint: str,
) -> LatentIndex:
    """Return the index of the shards that were written; a part without a readable image has no file."""
    paths = [path for path in paths if path.exists()]
    shards = [open_shard(path, config.dtype, config.flip, fingerprint) for path in paths]
    return LatentIndex(
        fingerprint=fingerprint,
        count=sum(len(shard["labels"]) for shard in shards),
        shape=cast(tuple[int, int, int], tuple(shards[0]["latents"].shape[1:])),
        dtype=config.dtype,
        flipped=config.flip,
        class_names=dataset.class_names,
        image_size=dataset.shape[1:],
        posterior=config.posterior,
        seed=config.seed,
        scaling=encoder.scaling,
        vae=source,
        shards=tuple(
            ShardEntry(file=path.name, count=len(shard["labels"]), size=path.stat().st_size)
            for path, shard in zip(paths, shards, strict=True)
        ),
    )


def _autoencoder(config: FeaturesConfig, vae: nn.Module | None) -> tuple[nn.Module, VaeIdentity]:
    """Return the autoencoder in evaluation mode, and its identity; load it from `config.vae` if `vae` is None."""
    loaded = None
    if vae is None:
        if config.vae is None:
            raise DataError("No autoencoder is given: set vae to the folder or hub id of a diffusers autoencoder.")
        device, local = open_device(config.device), user_path(config.vae)
        vae, loaded = load_vae(config.vae, config.subfolder), str(local.resolve()) if local.is_dir() else config.vae
    subfolder = config.subfolder if loaded else None
    identity = VaeIdentity(kind=type(vae).__name__, source=loaded, subfolder=subfolder, sha256=weights_digest(vae))
    if loaded:
        with quiet_diffusers():
            vae = vae.to(device, DTYPES[config.vae_dtype])
    return vae.eval(), identity


def _scaling(config: FeaturesConfig, vae: nn.Module) -> LatentScaling:
    """Return the autoencoder's scaling, with the factor and the shift of the config in place of its own."""
    scaling = scaling_of(vae)
    if config.scaling_factor is not None:
        scaling = scaling.model_copy(update={"factor": config.scaling_factor})
    if config.shift_factor is not None:
        scaling = scaling.model_copy(update={"mean": (config.shift_factor,)})
    return scaling


def _fingerprint(config: FeaturesConfig, encoder: Encoder, source: VaeIdentity, data: dict[str, object]) -> str:
    """Return a hash of everything that the stored latents depend on; `data` is the identity of the images."""
    deciding = {
        "data": data, "vae": source.sha256, "vae_dtype": str(next(encoder.vae.parameters()).dtype),
        "scaling": encoder.scaling.model_dump(), "posterior": config.posterior, "seed": config.seed,
        "flip": config.flip, "dtype": config.dtype, "shard_size": config.shard_size,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _was_begun(folder: Path, paths: Sequence[Path], config: FeaturesConfig, fingerprint: str) -> bool:
    """Return whether a folder holds an index or shards with this fingerprint."""
    if (folder / INDEX).exists():
        return read_index(folder).fingerprint == fingerprint
    for path in paths:
        with suppress(DataError):
            open_shard(path, config.dtype, config.flip, fingerprint)
            return True
    return False


def _is_complete(path: Path, config: FeaturesConfig, fingerprint: str) -> bool:
    """Return whether a shard exists and is undamaged; raise a DataError if it belongs to other latents."""
    if not path.exists():
        return False
    try:
        open_shard(path, config.dtype, config.flip, fingerprint)
    except DamagedShardError:
        return False
    return True
