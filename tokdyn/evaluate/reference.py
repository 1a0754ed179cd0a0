"""The side that generated images are compared with: images, images seen before, or published statistics."""

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
class Seen:
    """A reference that an extractor has seen before.

    Attributes:
        path: The file of statistics.
        statistics: What it holds.
    """

    path: Path
    statistics: Statistics


@dataclass(frozen=True)
class Unseen:
    """A reference of images.

    Attributes:
        path: Where it was read from.
        images: The images.
        published: Moments that came with them and stand for a larger set, as in ADM's reference batches
            (arXiv:2105.05233); used with the Inception network alone, which they are of.
    """

    path: Path
    images: ImageSet
    published: Statistics | None


Reference = Seen | Unseen


def open_reference(config: EvalConfig) -> Reference | None:
    """Opens the reference, or the cache in its place; looks at no image yet.

    Raises:
        DataError: It is missing, damaged or empty, or the cache is of another reference.
    """
    path = config.reference
    if path is None:
        return None
    if path.suffix == ".safetensors" and path.is_file():
        return _without_cache(config, Seen(path, load_statistics(path)))
    published = None
    if path.suffix == ".npz" and path.is_file() and {"mu", "sigma"} <= npz_keys(path):
        published = load_moments(path)
        if IMAGES not in npz_keys(path):
            return _without_cache(config, Seen(path, published))
    return _or_cached(config, Unseen(path, open_images(path), published))


def check_extractor(reference: Reference, extractor: ExtractorInfo, width: int) -> None:
    """Refuses statistics that another network made.

    Args:
        reference: As opened.
        extractor: The network of this evaluation.
        width: Its number of features.

    Raises:
        DataError: They are of another network, or of another width.
    """
    if isinstance(reference, Seen):
        statistics: Statistics | None = reference.statistics
    else:
        statistics = reference.published if extractor.standard else None
    if statistics is None:
        return
    if statistics.origin is not None and not statistics.origin.extractor.same_network(extractor):
        raise DataError(
            f"{reference.path} was made with the {statistics.origin.extractor}, but this run uses the {extractor}: "
            "use that extractor, or make the statistics again with cache=ANOTHER.safetensors"
        )
    if len(statistics.moments.mean) != width:
        raise DataError(
            f"{reference.path} holds statistics of {len(statistics.moments.mean)} features, {extractor.name} has "
            f"{width}: another network made them"
        )


def measure_reference(
    config: EvalConfig, reference: Unseen, extractor: ExtractorInfo, seen: Extracted, values: dict[str, float]
) -> Statistics:
    """Statistics of a reference that the extractor has just seen; fills the cache.

    Args:
        config: Settings.
        reference: The images.
        extractor: The network.
        seen: What it said about them.
        values: Numbers that the reference has by itself.
    """
    published = reference.published if extractor.standard else None
    moments = moments_of(seen.features) if published is None else published.moments
    origin = Origin(
        extractor=extractor,
        images=len(seen.features),
        image_size=seen.image_size,
        source=reference.path.name,
        fingerprint=_fingerprint(config, reference.images),
        published_moments=published is not None,
        values=values,
    )
    if config.cache is not None:
        save_statistics(config.cache, seen.features, moments, origin)
    return Statistics(moments, seen.features, origin)


def _without_cache(config: EvalConfig, reference: Seen) -> Seen:
    """The reference, unless statistics should be made of statistics."""
    if config.cache is not None:
        raise DataError(f"{reference.path} holds statistics, not images: leave out cache=")
    return reference


def _or_cached(config: EvalConfig, reference: Unseen) -> Reference:
    """The cache, if there is one and it is of this reference; otherwise the reference."""
    if config.cache is None or not config.cache.exists():
        return reference
    statistics = load_statistics(config.cache)
    if statistics.origin is None or statistics.origin.fingerprint != _fingerprint(config, reference.images):
        raise DataError(
            f"{config.cache} does not hold the statistics of {reference.path} as it is now and with this "
            "reference_limit and seed: delete it, or name another file with cache="
        )
    return Seen(config.cache, statistics)


def _fingerprint(config: EvalConfig, images: ImageSet) -> str:
    """Of the images chosen from the reference."""
    limit = config.reference_limit
    choice = "all" if limit is None or limit >= len(images) else f"{limit} drawn with seed {config.seed}"
    return f"{images.fingerprint()} {choice}"
