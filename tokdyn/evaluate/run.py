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
    ImageReference,
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
from tokdyn.team import ALONE, Team

COMPARING = {"frechet", "kid", "precision_recall"}
RESULT_FILE = "evaluation.json"


def evaluate(config: EvalConfig, team: Team = ALONE) -> EvalResult:
    """Measure generated images, compared with a reference if there is one.

    Unsuitable inputs are refused at the start: the extractor is tried on one image before it runs on all. Images that
    cannot be read are left out, with a warning in the result.

    Args:
        config: The settings.
        team: Processes that call this function with the same settings. Each computes the features of a share of the
            images, in the batches in which one process computes them; the first gathers the features and computes the
            metrics, so that they are those of one process.

    Returns:
        The metrics, with everything that is needed to repeat the evaluation, the same in all processes. It is also
        written to `config.out/evaluation.json` if `config.out` is set.

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
    with team.after_first():
        extractor = open_extractor(config)
    indices = choose(len(generated), config.limit, config.seed)
    facts = _facts(config, generated, indices, reference, extractor)
    metrics, _ = plan(config, facts)
    inputs = [facts.generated, facts.reference, facts.moments, facts.features, extractor.info.model_dump(mode="json")]
    team.agree("input or other settings", [config.model_dump(mode="json"), inputs])
    opened = perf_counter()

    extracted = extract("Generated images", generated, indices, extractor, config.batch_size, config.on_error, team)
    generated_done = perf_counter()
    images: Extracted | None = None
    if isinstance(reference, ImageReference) and (COMPARING & set(metrics) or config.cache is not None):
        chosen = choose(len(reference.images), config.reference_limit, config.seed)
        images = extract(
            "Reference images", reference.images, chosen, extractor, config.batch_size, config.on_error, team
        )
    if extracted is None:
        return EvalResult.model_validate(team.from_first(None))
    statistics: Statistics | None = None
    if reference is not None and (COMPARING & set(metrics) or config.cache is not None):
        statistics = _reference_statistics(config, reference, extractor, images)
    unreadable = () if images is None else images.unreadable
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
        machine=team.described(describe(extractor.device)),
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
    team.from_first(result.model_dump(mode="json"))
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


def _reference_statistics(
    config: EvalConfig, reference: Reference, extractor: Extractor, extracted: Extracted | None
) -> Statistics:
    """Return the statistics of the reference.

    Args:
        config: The settings.
        reference: The reference.
        extractor: The network.
        extracted: What it computed for the images of the reference; None if that consists of statistics.
    """
    if isinstance(reference, StatisticsReference):
        return reference.statistics
    assert extracted is not None
    values = measure_alone(config, extractor.info, extracted)
    return measure_reference(config, reference, extractor.info, extracted, values)
