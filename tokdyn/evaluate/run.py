"""Run an evaluation: open and check the inputs, extract features, compute metrics."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from tokdyn.data.decode import quiet
from tokdyn.errors import DataError
from tokdyn.evaluate.config import EvalConfig
from tokdyn.evaluate.extractor import Extractor, Outputs
from tokdyn.evaluate.features import Extracted, choose, extract
from tokdyn.evaluate.images import ImageSet, open_images
from tokdyn.evaluate.measure import measure, measure_alone, reliability_warnings
from tokdyn.evaluate.networks import open_extractor
from tokdyn.evaluate.plan import Facts, plan
from tokdyn.evaluate.reference import (
    Reference,
    StatisticsReference,
    check_extractor,
    measure_reference,
    open_reference,
)
from tokdyn.evaluate.result import EvalResult, versions
from tokdyn.evaluate.statistics import Statistics
from tokdyn.files import require_folder
from tokdyn.host import describe, settle_memory
from tokdyn.progress import progress

COMPARING = {"frechet", "kid", "precision_recall"}
RESULT_FILE = "evaluation.json"


def evaluate(config: EvalConfig) -> EvalResult:
    """Measure generated images, compared with a reference if there is one.

    Unsuitable inputs are refused at the start: the extractor is tried on one image before it runs on all. Images that
    cannot be read are left out, with a warning in the result.

    Args:
        config: The settings.

    Returns:
        The metrics, with everything that is needed to repeat the evaluation. It is also written to
        `config.out/evaluation.json` if `config.out` is set.

    Raises:
        DataError: Images or statistics are missing, fewer than two images can be read, or the statistics are those of
            another network.
        CheckpointError: The extractor is missing, fails on the images, or does not return features.
        InputError: There is no such device.
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
    indices = choose(len(generated), config.limit, config.seed)
    facts = _facts(config, generated, indices, reference, extractor)
    metrics, _ = plan(config, facts)
    opened = perf_counter()

    extracted = _extract(config, "Generated", generated, indices, extractor)
    generated_done = perf_counter()
    statistics: Statistics | None = None
    unreadable: tuple[str, ...] = ()
    if reference is not None and (COMPARING & set(metrics) or config.cache is not None):
        statistics, unreadable = _reference_statistics(config, reference, extractor)
    reference_done = perf_counter()

    metrics, left_out = plan(config, _readable(facts, extracted, statistics))
    findings = measure(config, metrics, extractor, extracted, statistics)
    measured = perf_counter()
    origin = None if statistics is None else statistics.origin
    result = EvalResult(
        values=findings.values,
        spread=findings.spread,
        reference_values={} if origin is None else origin.values,
        generated_images=len(extracted.features),
        reference_images=None if origin is None else origin.images,
        extractor=extractor.info,
        used=findings.used,
        warnings=(*reliability_warnings(metrics, extractor.info, extracted, statistics), *unreadable),
        notes=(*left_out, *findings.notes),
        config=config,
        versions=versions(),
        machine=describe(extractor.device),
        seconds={
            "opening": opened - started,
            "generated": generated_done - opened,
            "reference": reference_done - generated_done,
            "metrics": measured - reference_done,
            "total": measured - started,
        },
    )
    if config.out is not None:
        result.save(config.out / RESULT_FILE)
    return result


def _facts(
    config: EvalConfig,
    generated: ImageSet,
    indices: NDArray[np.int64],
    reference: Reference | None,
    extractor: Extractor,
) -> Facts:
    """Return the properties of the inputs, found with one image; refuse statistics of another network."""
    first = _first_outputs(generated, indices, extractor)
    features, count = False, None
    if isinstance(reference, StatisticsReference):
        features = reference.statistics.features is not None
        count = None if reference.statistics.origin is None else reference.statistics.origin.images
    elif reference is not None:
        features, count = True, len(choose(len(reference.images), config.reference_limit, config.seed))
    if reference is not None:
        check_extractor(reference, extractor.info, first.features.shape[1])
    return Facts(
        extractor=extractor.info,
        classes=0 if first.logits is None else first.logits.shape[1],
        generated=len(indices),
        labels=None if generated.labels is None else generated.labels.at(indices),
        reference=count,
        moments=reference is not None,
        features=features,
    )


def _readable(facts: Facts, extracted: Extracted, statistics: Statistics | None) -> Facts:
    """Return the facts with the numbers and labels of the images that could be read."""
    origin = None if statistics is None else statistics.origin
    reference = facts.reference if origin is None else origin.images
    return replace(facts, generated=len(extracted.features), labels=extracted.labels, reference=reference)


def _first_outputs(images: ImageSet, indices: NDArray[np.int64], extractor: Extractor) -> Outputs:
    """Run the extractor on the first readable image; raise a DataError if there is none."""
    error: DataError | None = None
    with quiet():
        for image in images.images(indices.tolist(), extractor.info.input_size):
            if not isinstance(image, DataError):
                return extractor(rearrange(torch.from_numpy(image.copy()), "h w c -> 1 c h w").contiguous())
            error = error or image
    raise DataError(f"None of the images in {images.path} can be read: {error}")


def _extract(
    config: EvalConfig, title: str, images: ImageSet, indices: NDArray[np.int64], extractor: Extractor
) -> Extracted:
    """Run the extractor over the images, with a progress bar of that title."""
    with progress(f"{title} images", len(indices)) as advance:
        return extract(images, indices, extractor, config.batch_size, config.on_error, advance)


def _reference_statistics(
    config: EvalConfig, reference: Reference, extractor: Extractor
) -> tuple[Statistics, tuple[str, ...]]:
    """Return the statistics of the reference, and the error messages of images that could not be read.

    The extractor runs only if the reference consists of images.
    """
    if isinstance(reference, StatisticsReference):
        return reference.statistics, ()
    indices = choose(len(reference.images), config.reference_limit, config.seed)
    extracted = _extract(config, "Reference", reference.images, indices, extractor)
    values = measure_alone(config, extractor.info, extracted)
    return measure_reference(config, reference, extractor.info, extracted, values), extracted.unreadable
