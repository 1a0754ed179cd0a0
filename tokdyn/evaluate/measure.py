"""Compute the metrics of an evaluation by name, and say which of them are unreliable."""

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
    """The metrics computed so far; `values`, `spread`, `used` and `notes` are those of `EvalResult`."""

    extractor: ExtractorInfo
    values: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: str, value: float, spread: float | None = None) -> None:
        """Record a metric under the name that `metric_name` gives it."""
        name = metric_name(metric, self.extractor)
        self.values[name] = value
        if spread is not None:
            self.spread[name] = spread

    def use(self, setting: str, asked: int, used: int, why: str) -> int:
        """Record the value that is used for a setting, with a note if it was reduced.

        Args:
            setting: Name of the setting.
            asked: Value in the settings.
            used: Value that is used.
            why: Reason to reduce it.

        Returns:
            The value that is used.
        """
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
    """Compute metrics that `plan` has found possible.

    Args:
        config: Settings.
        metrics: Metrics to compute.
        extractor: Network that computed the features of the generated images and of the reference.
        generated: Features and logits of the generated images.
        reference: Statistics of the reference; None without one.
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
    """Compute the class score and accuracy of the reference images, to compare those of generated images with."""
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
    """Yield a sentence about each thing that makes the metrics unreliable or hard to compare."""
    if extractor.kind == "inception" and not extractor.standard:
        yield f"{extractor.name} are not the published Inception weights: the metrics are not FID, IS or KID"
    yield from generated.unreadable
    if generated.image_size is None:
        yield "the generated images differ in size, so other pictures may be among them: if not, set input_size"
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
                    f"{name} is unreliable: the covariance of {width} features does not have full rank with {count} "
                    f"{side} images, give more than {width} images (10,000 or more for values to be compared)"
                )
    if origin is not None and origin.image_size != generated.image_size:
        yield (
            f"the generated images are {_pixels(generated.image_size)}, the reference is {_pixels(origin.image_size)}: "
            "set input_size to compare at one size"
        )


def _pixels(size: tuple[int, int] | None) -> str:
    """Describe an image size (rows, columns) in words; None means several sizes."""
    return "of several sizes" if size is None else f"{size[0]} x {size[1]} pixels"


def _add_score(config: EvalConfig, findings: Findings, logits: Tensor) -> None:
    """Add the class score of the logits (N, C) to the findings."""
    splits = formulas.score_splits(len(logits), config.score_splits)
    findings.use("score_splits", config.score_splits, splits, f"{len(logits)} images")
    mean, spread = formulas.class_score(logits, splits, config.seed)
    findings.add("class_score", mean, spread if splits > 1 else None)


def _add_accuracy(findings: Findings, logits: Tensor, labels: Labels) -> None:
    """Add the class accuracy of the logits (N, C) to the findings."""
    findings.add("class_accuracy", formulas.class_accuracy(logits, labels.among(logits.shape[1])))
