"""The evaluation itself: open, check, look at the images, measure."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from tokdyn.data.decode import quiet
from tokdyn.errors import DataError
from tokdyn.evaluate.config import EvalConfig
from tokdyn.evaluate.extractor import Extractor, Outputs
from tokdyn.evaluate.features import Extracted, choose, extract
from tokdyn.evaluate.images import ImageSet, open_images
from tokdyn.evaluate.measure import doubts, measure, measure_alone
from tokdyn.evaluate.networks import open_extractor
from tokdyn.evaluate.plan import Facts, plan
from tokdyn.evaluate.reference import Reference, Seen, check_extractor, measure_reference, open_reference
from tokdyn.evaluate.result import EvalResult, versions
from tokdyn.evaluate.statistics import Statistics
from tokdyn.files import require_folder
from tokdyn.host import describe, settle_memory
from tokdyn.progress import progress

COMPARING = {"frechet", "kid", "precision_recall"}
RESULT_FILE = "evaluation.json"


def evaluate(config: EvalConfig) -> EvalResult:
    """Measures generated images, against a reference if there is one.

    What can be refused is refused before the long work starts: one image goes through the extractor first.

    Args:
        config: What to measure and with what.

    Returns:
        The numbers under honest names, with what is needed to repeat them.

    Raises:
        DataError: Images or statistics are missing, unreadable, too few or of another network.
        CheckpointError: The extractor is missing, or does not do what an extractor does.
        InputError: The device is not there.
    """
    started = perf_counter()
    settle_memory()
    if config.out is not None:
        require_folder(config.out)
    if config.cache is not None:
        require_folder(config.cache.parent, "cache")
    generated = open_images(config.generated)
    reference = open_reference(config)
    extractor = open_extractor(config)
    chosen = choose(len(generated), config.limit, config.seed)
    facts = _facts(config, generated, chosen, reference, extractor)
    metrics, _ = plan(config, facts)
    opened = perf_counter()

    seen = _look(config, "Generated", generated, chosen, extractor)
    looked = perf_counter()
    statistics: Statistics | None = None
    unreadable: tuple[str, ...] = ()
    if reference is not None and (COMPARING & set(metrics) or config.cache is not None):
        statistics, unreadable = _see(config, reference, extractor)
    referred = perf_counter()

    metrics, left_out = plan(config, _after(facts, seen, statistics))
    found = measure(config, metrics, extractor, seen, statistics)
    measured = perf_counter()
    origin = None if statistics is None else statistics.origin
    result = EvalResult(
        values=found.values,
        spread=found.spread,
        reference_values={} if origin is None else origin.values,
        generated_images=len(seen.features),
        reference_images=None if origin is None else origin.images,
        extractor=extractor.info,
        used=found.used,
        warnings=(*doubts(metrics, extractor.info, seen, statistics), *unreadable),
        notes=(*left_out, *found.notes),
        config=config,
        versions=versions(),
        machine=describe(extractor.device),
        seconds={
            "opening": opened - started,
            "generated": looked - opened,
            "reference": referred - looked,
            "metrics": measured - referred,
            "total": measured - started,
        },
    )
    if config.out is not None:
        result.save(config.out / RESULT_FILE)
    return result


def _facts(
    config: EvalConfig,
    generated: ImageSet,
    chosen: NDArray[np.int64],
    reference: Reference | None,
    extractor: Extractor,
) -> Facts:
    """What there is to work with, learnt from the first image; refuses statistics of another network."""
    first = _first(generated, chosen, extractor)
    features, count = False, None
    if isinstance(reference, Seen):
        features = reference.statistics.features is not None
        count = None if reference.statistics.origin is None else reference.statistics.origin.images
    elif reference is not None:
        features, count = True, len(choose(len(reference.images), config.reference_limit, config.seed))
    if reference is not None:
        check_extractor(reference, extractor.info, first.features.shape[1])
    return Facts(
        extractor=extractor.info,
        classes=0 if first.logits is None else first.logits.shape[1],
        generated=len(chosen),
        labels=None if generated.labels is None else generated.labels.at(chosen),
        reference=count,
        moments=reference is not None,
        features=features,
    )


def _after(facts: Facts, seen: Extracted, statistics: Statistics | None) -> Facts:
    """The facts once unreadable images have been left out."""
    origin = None if statistics is None else statistics.origin
    reference = facts.reference if origin is None else origin.images
    return replace(facts, generated=len(seen.features), labels=seen.labels, reference=reference)


def _first(images: ImageSet, indices: NDArray[np.int64], extractor: Extractor) -> Outputs:
    """The extractor's outputs for the first readable image."""
    error: DataError | None = None
    with quiet():
        for image in images.images(indices.tolist(), extractor.info.input_size):
            if not isinstance(image, DataError):
                return extractor(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].contiguous())
            error = error or image
    raise DataError(f"none of the images in {images.path} can be read: {error}")


def _look(
    config: EvalConfig, title: str, images: ImageSet, chosen: NDArray[np.int64], extractor: Extractor
) -> Extracted:
    """Runs the extractor over the images with a progress bar."""
    with progress(f"{title} images", len(chosen)) as advance:
        return extract(images, chosen, extractor, config.batch_size, config.on_error, advance)


def _see(config: EvalConfig, reference: Reference, extractor: Extractor) -> tuple[Statistics, tuple[str, ...]]:
    """Statistics of the reference, and sentences on images of it that could not be read."""
    if isinstance(reference, Seen):
        return reference.statistics, ()
    chosen = choose(len(reference.images), config.reference_limit, config.seed)
    seen = _look(config, "Reference", reference.images, chosen, extractor)
    values = measure_alone(config, extractor.info, seen)
    return measure_reference(config, reference, extractor.info, seen, values), seen.unreadable
