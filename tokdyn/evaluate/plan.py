"""Decides which metrics the inputs allow, before any work is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokdyn.errors import DataError
from tokdyn.evaluate.config import METRICS, EvalConfig, Metric
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.images import Labels


@dataclass(frozen=True)
class Facts:
    """What is known of the inputs of an evaluation.

    Attributes:
        extractor: Identity of the network.
        classes: Number of its logits, 0 without a classifier.
        generated: Number of generated images.
        labels: Labels of the generated images, or None.
        reference: Number of reference images, or None if it is not known.
        moments: Whether the reference has a mean and covariance.
        features: Whether the reference has features.
    """

    extractor: ExtractorInfo
    classes: int
    generated: int
    labels: Labels | None
    reference: int | None
    moments: bool
    features: bool


def plan(config: EvalConfig, facts: Facts) -> tuple[tuple[Metric, ...], tuple[str, ...]]:
    """Choose the metrics: those that were asked for, or all that are possible.

    Returns:
        The metrics, and a note on each one that was left out.

    Raises:
        DataError: A metric that was asked for is not possible, or none is.
    """
    reasons = {metric: _obstacle(metric, config, facts) for metric in config.metrics or METRICS}
    if config.metrics is not None:
        for metric, reason in reasons.items():
            if reason:
                raise DataError(f"{metric} cannot be measured: {reason}.")
    possible = tuple(metric for metric, reason in reasons.items() if reason is None)
    if not possible:
        raise DataError(f"Nothing can be measured: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}.")
    return possible, tuple(f"{metric} left out: {reason}" for metric, reason in reasons.items() if reason)


def _obstacle(metric: Metric, config: EvalConfig, facts: Facts) -> str | None:
    """Return why a metric cannot be measured, or None."""
    checks = {
        "frechet": _no_moments,
        "score": _no_logits,
        "kid": _no_features,
        "precision_recall": _too_few_neighbours,
        "class_accuracy": _no_classes,
    }
    return next(checks[metric](config, facts), None)


def _no_moments(config: EvalConfig, facts: Facts) -> Iterator[str]:
    if not facts.moments:
        yield "there is nothing to compare with, give reference="


def _no_features(config: EvalConfig, facts: Facts) -> Iterator[str]:
    yield from _no_moments(config, facts)
    if not facts.features:
        yield "the reference holds a mean and a covariance only, give its images or a file made with cache="


def _too_few_neighbours(config: EvalConfig, facts: Facts) -> Iterator[str]:
    yield from _no_features(config, facts)
    fewest = min(facts.generated, facts.generated if facts.reference is None else facts.reference)
    if fewest <= config.neighbours:
        yield f"{fewest} images have no {config.neighbours} neighbours, lower neighbours= or give more images"


def _no_logits(config: EvalConfig, facts: Facts) -> Iterator[str]:
    if not facts.classes:
        yield f"{facts.extractor.name} has no classifier, use an extractor that returns logits too"


def _no_classes(config: EvalConfig, facts: Facts) -> Iterator[str]:
    yield from _no_logits(config, facts)
    reason = label_obstacle(facts.extractor, facts.classes, facts.labels)
    if reason:
        yield reason


def label_obstacle(extractor: ExtractorInfo, classes: int, labels: Labels | None) -> str | None:
    """Return why labels cannot be compared with the network's classes, or None.

    Args:
        extractor: Identity of the network.
        classes: Number of its logits.
        labels: Labels of the images, or None.
    """
    if extractor.kind == "inception":
        return f"the {classes} outputs of {extractor.name} are not numbered as data sets number their classes"
    if labels is None:
        return "the images have no classes, put them into class folders or labels into arr_1 of the npz"
    if labels.num_classes not in (None, classes) and labels.numbers is None:
        return f"the images have {labels.num_classes} class folders, {extractor.name} has {classes} classes"
    values = labels.among(classes)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= classes:
        return f"the labels reach from {lowest} to {highest}, {extractor.name} has {classes} classes"
    return None
