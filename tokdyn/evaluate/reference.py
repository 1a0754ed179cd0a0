"""Open the reference of an evaluation: images, cached statistics of images, or published statistics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokdyn.errors import DataError
from tokdyn.evaluate.config import EvalConfig
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.features import Extracted
from tokdyn.evaluate.images import ImageSet, open_images
from tokdyn.evaluate.npz import IMAGES, npz_keys
from tokdyn.evaluate.statistics import (
    Origin,
    Statistics,
    load_moments,
    load_statistics,
    moments_of,
    save_statistics,
)


@dataclass(frozen=True)
class StatisticsReference:
    """A reference whose statistics are read from a file.

    Attributes:
        path: Path of the file.
        statistics: Content of the file.
    """

    path: Path
    statistics: Statistics


@dataclass(frozen=True)
class ImageReference:
    """A reference whose statistics have to be computed from images.

    Attributes:
        path: Path of the images.
        images: The images.
        published: Mean and covariance that are stored beside the images and were computed from a larger set, as in
            ADM's reference batches (arXiv 2105.05233). They were made with the published Inception network and are
            used only with it. None if there are none.
    """

    path: Path
    images: ImageSet
    published: Statistics | None


Reference = StatisticsReference | ImageReference


def open_reference(config: EvalConfig) -> Reference | None:
    """Open the reference, or its cached statistics if they exist, without decoding an image.

    Returns:
        The reference; None if the settings have none.

    Raises:
        DataError: The reference is missing, damaged or empty, or the cache belongs to another reference.
    """
    path = config.reference
    if path is None:
        return None
    if path.suffix == ".safetensors" and path.is_file():
        return _without_cache(config, StatisticsReference(path, load_statistics(path)))
    published = None
    if path.suffix == ".npz" and path.is_file() and {"mu", "sigma"} <= npz_keys(path):
        published = load_moments(path)
        if IMAGES not in npz_keys(path):
            return _without_cache(config, StatisticsReference(path, published))
    return _or_cached(config, ImageReference(path, open_images(path), published))


def check_extractor(reference: Reference, extractor: ExtractorInfo, width: int) -> None:
    """Refuse statistics that were made with another network.

    Args:
        reference: The reference.
        extractor: Identity of the network of this evaluation.
        width: Number of features of this network.

    Raises:
        DataError: The statistics were made with another network, or have another number of features.
    """
    if isinstance(reference, StatisticsReference):
        statistics: Statistics | None = reference.statistics
    else:
        statistics = reference.published if extractor.standard else None
    if statistics is None:
        return
    if statistics.origin is not None and not statistics.origin.extractor.same_network(extractor):
        raise DataError(
            f"{reference.path} was made with the {statistics.origin.extractor}, but this evaluation uses the "
            f"{extractor}: use that extractor, or make the statistics again with cache=ANOTHER.safetensors."
        )
    if len(statistics.moments.mean) != width:
        raise DataError(
            f"{reference.path} holds statistics of {len(statistics.moments.mean)} features, but {extractor.name} has "
            f"{width}: use the network that made them."
        )


def measure_reference(
    config: EvalConfig,
    reference: ImageReference,
    extractor: ExtractorInfo,
    extracted: Extracted,
    values: dict[str, float],
) -> Statistics:
    """Compute the statistics of a reference of images, and write them to `config.cache` if it is set.

    Args:
        config: Settings.
        reference: The reference.
        extractor: Identity of the network.
        extracted: Features and logits of the reference images.
        values: Class score and accuracy of the reference images, stored with the statistics.
    """
    published = reference.published if extractor.standard else None
    moments = moments_of(extracted.features) if published is None else published.moments
    origin = Origin(
        extractor=extractor,
        images=len(extracted.features),
        image_size=extracted.image_size,
        source=reference.path.name,
        fingerprint=_fingerprint(config, reference.images),
        published_moments=published is not None,
        values=values,
    )
    if config.cache is not None:
        save_statistics(config.cache, extracted.features, moments, origin)
    return Statistics(moments, extracted.features, origin)


def _without_cache(config: EvalConfig, reference: StatisticsReference) -> StatisticsReference:
    """Return the reference; raise a DataError if `cache` is set, because statistics are not cached again."""
    if config.cache is not None:
        raise DataError(f"{reference.path} holds statistics, not images: remove cache=.")
    return reference


def _or_cached(config: EvalConfig, reference: ImageReference) -> Reference:
    """Return the cached statistics of the reference if the cache exists; otherwise the reference.

    Raises:
        DataError: The cache belongs to other images.
    """
    if config.cache is None or not config.cache.exists():
        return reference
    statistics = load_statistics(config.cache)
    if statistics.origin is None or statistics.origin.fingerprint != _fingerprint(config, reference.images):
        raise DataError(
            f"{config.cache} was not made from the images that {reference.path} now holds, with this reference_limit "
            "and seed: delete it, or name another file with cache=."
        )
    return StatisticsReference(config.cache, statistics)


def _fingerprint(config: EvalConfig, images: ImageSet) -> str:
    """Return a text that identifies the images of the reference and the choice made from them."""
    limit = config.reference_limit
    choice = "all" if limit is None or limit >= len(images) else f"{limit} drawn with seed {config.seed}"
    return f"{images.fingerprint()} {choice}"
