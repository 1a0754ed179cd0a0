"""Computes named metrics from features and logits, and warns where they are unreliable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tokdyn.evaluate import metrics as formulas
from tokdyn.evaluate.config import EvalConfig, Metric
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo
from tokdyn.evaluate.features import Extracted
from tokdyn.evaluate.images import Labels
from tokdyn.evaluate.plan import label_obstacle
from tokdyn.evaluate.result import metric_name
from tokdyn.evaluate.statistics import Statistics, moments_of


@dataclass
class Findings:
    """Metrics as they are computed; the fields are those of `EvalResult`."""

    extractor: ExtractorInfo
    values: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: str, value: float, spread: float | None = None) -> None:
        """Record a metric under the name that it may carry."""
        name = metric_name(metric, self.extractor)
        self.values[name] = value
        if spread is not None:
            self.spread[name] = spread

    def use(self, setting: str, asked: int, used: int, why: str) -> int:
        """Record the value of a setting that is in force, with a note if it was reduced."""
        self.used[setting] = used
        if used != asked:
            self.notes.append(f"{setting} reduced from {asked} to {used}: {why}")
        return used


def measure(
    config: EvalConfig,
    metrics: Sequence[Metric],
    extractor: Extractor,
    generated: Extracted,
    reference: Statistics | None,
) -> Findings:
    """Compute the metrics, which `plan` has found possible.

    Args:
        config: Settings.
        metrics: Metrics to compute.
        extractor: Network that produced the features of both sides.
        generated: Its outputs for the generated images.
        reference: Statistics of the reference.
    """
    findings = Findings(extractor.info)
    features, reference_features = generated.features, None if reference is None else reference.features
    if "frechet" in metrics and reference is not None:
        findings.add("frechet_distance", formulas.frechet_distance(moments_of(features), reference.moments))
    if "score" in metrics and generated.logits is not None:
        _add_score(config, findings, generated.logits)
    if "kid" in metrics and reference_features is not None:
        fewer = min(len(features), len(reference_features))
        size = formulas.subset_size(fewer, config.kid_subset_size)
        findings.use("kid_subset_size", config.kid_subset_size, size, f"the smaller set has {fewer} images")
        findings.used["kid_subsets"] = config.kid_subsets
        distance = formulas.kernel_distance(features, reference_features, config.kid_subsets, size, config.seed)
        findings.add("kernel_distance", *distance)
    if "precision_recall" in metrics and reference_features is not None:
        findings.used["neighbours"] = config.neighbours
        both = formulas.precision_recall(features, reference_features, config.neighbours, extractor.device)
        for name, value in zip(("precision", "recall"), both, strict=True):
            findings.add(name, value)
    if "class_accuracy" in metrics and generated.logits is not None and generated.labels is not None:
        _add_accuracy(findings, generated.logits, generated.labels)
    return findings


def measure_alone(config: EvalConfig, extractor: ExtractorInfo, extracted: Extracted) -> dict[str, float]:
    """Score the reference by itself, as a yardstick for the class score and accuracy of generated images."""
    findings = Findings(extractor)
    if extracted.logits is not None:
        _add_score(config, findings, extracted.logits)
        if (
            extracted.labels is not None
            and label_obstacle(extractor, extracted.logits.shape[1], extracted.labels) is None
        ):
            _add_accuracy(findings, extracted.logits, extracted.labels)
    return findings.values


def reliability_warnings(
    metrics: Sequence[Metric], extractor: ExtractorInfo, generated: Extracted, reference: Statistics | None
) -> Iterator[str]:
    """Yield what makes the numbers unreliable or hard to compare, a sentence each."""
    if extractor.kind == "inception" and not extractor.standard:
        yield f"{extractor.name} are not the published Inception weights: the numbers are not FID, IS or KID"
    yield from generated.unreadable
    if generated.image_size is None:
        yield "the generated images differ in size, so figures may lie among them: if none do, set input_size"
    if reference is None:
        return
    origin, width = reference.origin, generated.features.shape[1]
    sides = [("generated", len(generated.features))]
    if origin is None:
        yield f"the reference does not say which network made it: the distance holds only if it was {extractor.name}"
    elif not origin.published_moments:
        sides.append(("reference", origin.images))
    if "frechet" in metrics:
        name = metric_name("frechet_distance", extractor)
        for side, count in sides:
            if count <= width:
                yield (
                    f"{name} is unreliable: the covariance of {count} {side} images has not full rank for {width} "
                    f"features, give more than {width} images (10,000 or more for numbers to be compared)"
                )
    if origin is not None and origin.image_size != generated.image_size:
        yield (
            f"the generated images are {_pixels(generated.image_size)}, the reference is {_pixels(origin.image_size)}: "
            "set input_size to compare at one size"
        )


def _pixels(size: tuple[int, int] | None) -> str:
    """Describe an image size."""
    return "of several sizes" if size is None else f"{size[0]} x {size[1]} pixels"


def _add_score(config: EvalConfig, findings: Findings, logits: Tensor) -> None:
    """Add the class score of logits (N, C)."""
    splits = formulas.score_splits(len(logits), config.score_splits)
    findings.use("score_splits", config.score_splits, splits, f"{len(logits)} images")
    mean, spread = formulas.class_score(logits, splits, config.seed)
    findings.add("class_score", mean, spread if splits > 1 else None)


def _add_accuracy(findings: Findings, logits: Tensor, labels: Labels) -> None:
    """Add the class accuracy of logits (N, C)."""
    findings.add("class_accuracy", formulas.class_accuracy(logits, labels.among(logits.shape[1])))
