"""Open the data set that the section `data` of a recipe describes."""

from __future__ import annotations

from tokdyn.data.base import Dataset
from tokdyn.data.config import DataConfig, rows_and_columns
from tokdyn.data.images import ImageDataset
from tokdyn.data.latents import LatentDataset
from tokdyn.data.shapes import ShapesDataset
from tokdyn.data.sources import open_source
from tokdyn.errors import DataError

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
        open_source(config.path),
        rows_and_columns(config.size),
        config.channels,
        config.num_classes,
        config.on_error,
        config.in_memory,
        config.memory_limit,
    )


def _open_latents(config: DataConfig, path: str) -> LatentDataset:
    """Open latents, and check that they have the size, the classes and the mirrored copies that the config asks for."""
    latents = LatentDataset(path)
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


_OR_ZIP = {"images": " or zip of images", "latents": " that `tokdyn features` wrote"}
