"""Open the data set that the section `data` of a recipe describes."""

from __future__ import annotations

from tokdyn.data.base import Dataset
from tokdyn.data.config import DataConfig, rows_and_columns
from tokdyn.data.images import ImageDataset
from tokdyn.data.latents import LatentDataset
from tokdyn.data.opening import local_tars, open_source
from tokdyn.data.ranges import LocalFile
from tokdyn.data.remote.addresses import Address, is_address
from tokdyn.data.remote.cache import open_files
from tokdyn.data.remote.latents import RemoteLatents
from tokdyn.data.remote.sources import default_cache, remote_tars
from tokdyn.data.shapes import ShapesDataset
from tokdyn.data.sources import INDEX
from tokdyn.data.tars.latents import TarLatents
from tokdyn.errors import DataError
from tokdyn.files import user_path

_DEFAULT_SIZE = 32  # pixels, of procedural shapes


def open_data(config: DataConfig) -> Dataset:
    """Open the data set that a config describes.

    Args:
        config: the section `data` of a recipe.

    Returns:
        The data set. Images are decoded here if they are to be held in memory (`config.in_memory`).

    Raises:
        DataError: the data are missing, empty or damaged, or contradict the config.
    """
    if config.kind == "shapes":
        if config.path is not None:
            raise DataError(
                f"path={config.path} has no effect with kind=shapes, which are drawn: remove path, or set kind=images "
                "or kind=latents."
            )
        size = rows_and_columns(config.size or _DEFAULT_SIZE)
        return ShapesDataset(size, config.channels, config.num_classes, config.seed, config.length)
    if config.path is None:
        raise DataError(f"kind={config.kind} needs a path: give that of the folder{_OR_ZIP[config.kind]}.")
    if config.kind == "latents":
        return _open_latents(config, config.path)
    if config.size is None:
        raise DataError("kind=images needs a size in pixels: give data.size=32 or data.size=32x48, for example.")
    return ImageDataset(
        open_source(config.path, config.cache, config.cache_limit),
        rows_and_columns(config.size),
        config.channels,
        config.num_classes,
        config.on_error,
        config.in_memory,
        config.memory_limit,
    )


def _open_latents(config: DataConfig, path: str) -> Dataset:
    """Open latents, and check that they have the size, the classes and the mirrored copies that the config asks for."""
    latents = _find_latents(config, path)
    if config.size is not None and rows_and_columns(config.size) != latents.shape[1:]:
        rows, columns = latents.shape[1:]
        raise DataError(
            f"The latents in {path} are {rows}x{columns}, but data.size={config.size} is expected: set "
            f"data.size={rows}x{columns}."
        )
    if config.num_classes is not None and config.num_classes != latents.num_classes:
        raise DataError(
            f"The latents in {path} have {latents.num_classes} classes, but data.num_classes={config.num_classes} is "
            f"expected: set data.num_classes={latents.num_classes}."
        )
    if config.flip:
        latents.require_flip()
    return latents


def _find_latents(config: DataConfig, path: str) -> Dataset:
    """Open a folder that `tokdyn features` wrote, or tars of arrays, here or at an address."""
    if is_address(path):
        address, cache = Address(path), config.cache or default_cache()
        if found := remote_tars(address, instead=INDEX):
            return TarLatents(address, open_files(found, cache, config.cache_limit), config.num_classes)
        return RemoteLatents(address, cache, config.cache_limit)
    try:
        tars = local_tars(user_path(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if tars:
        return TarLatents(path, [LocalFile(tar) for tar in tars], config.num_classes)
    return LatentDataset(path)


_OR_ZIP = {"images": ", the zip or the tars of images", "latents": " that `tokdyn features` wrote, or of tars"}
