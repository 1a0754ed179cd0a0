"""Decide which metrics the inputs allow, before features are extracted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokdyn.errors import DataError
from tokdyn.evaluate.config import METRICS, EvalConfig, Metric
from tokdyn.evaluate.extractor import ExtractorInfo
from tokdyn.evaluate.images import Labels


@dataclass(frozen=True)
class Facts:
    """The properties of the inputs that decide which metrics are possible.

    Attributes:
        extractor: Identity of the network.
        classes: Number of logits of the network; 0 if it has no classifier.
        generated: Number of generated images.
        labels: Labels of the generated images, or None.
        reference: Number of reference images, or None if it is not known.
        moments: Whether there is a reference, which always has a mean and a covariance.
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
    """Choose the metrics to compute: those of `config.metrics`, or all that are possible.

    Returns:
        The metrics, and a note on each metric that was left out.

    Raises:
        DataError: A metric of `config.metrics` is not possible, or none is possible at all.
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
    """Return the reason why a metric cannot be measured, or None if it can.

    Each check below yields its reasons, the most basic first; the first one is returned.
    """
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
        yield (
            f"with {fewest} images an image does not have {config.neighbours} neighbours, lower neighbours= or give "
            "more images"
        )


def _no_logits(config: EvalConfig, facts: Facts) -> Iterator[str]:
    if not facts.classes:
        yield f"{facts.extractor.name} has no classifier, use an extractor that returns logits too"


def _no_classes(config: EvalConfig, facts: Facts) -> Iterator[str]:
    yield from _no_logits(config, facts)
    reason = label_obstacle(facts.extractor, facts.classes, facts.labels)
    if reason:
        yield reason


def label_obstacle(extractor: ExtractorInfo, classes: int, labels: Labels | None) -> str | None:
    """Return the reason why labels cannot be compared with the network's classes, or None if they can.

    Args:
        extractor: Identity of the network.
        classes: Number of logits of the network.
        labels: Labels of the images, or None if they have none.
    """
    if extractor.kind == "inception":
        return f"the {classes} outputs of {extractor.name} are not in the order of a data set's classes"
    if labels is None:
        return "the images have no classes, put them into class folders or labels into arr_1 of the npz"
    if labels.num_classes not in (None, classes) and labels.numbers is None:
        return f"the images have {labels.num_classes} class folders, {extractor.name} has {classes} classes"
    values = labels.among(classes)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= classes:
        return f"the labels reach from {lowest} to {highest}, {extractor.name} has {classes} classes"
    return None
