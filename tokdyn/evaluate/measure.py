"""From features and logits to named numbers, and to sentences on how far they can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tokdyn.evaluate import metrics as formulas
from tokdyn.evaluate.config import EvalConfig, Metric
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo
from tokdyn.evaluate.features import Extracted
from tokdyn.evaluate.plan import label_obstacle
from tokdyn.evaluate.result import metric_name
from tokdyn.evaluate.statistics import Statistics, moments_of


@dataclass
class Findings:
    """Numbers as they come in; see `EvalResult` for the fields."""

    extractor: ExtractorInfo
    values: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, metric: str, value: float, spread: float | None = None) -> None:
        """Records a number under the name it may carry."""
        name = metric_name(metric, self.extractor)
        self.values[name] = value
        if spread is not None:
            self.spread[name] = spread

    def use(self, setting: str, asked: int, used: int, why: str) -> int:
        """Records the setting in force, with a note if it is not the one asked for."""
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
    """Computes the metrics, which `plan` has found possible.

    Args:
        config: Settings.
        metrics: What to compute.
        extractor: The network that saw both sides.
        generated: What it said about the generated images.
        reference: What is known of the reference.
    """
    found = Findings(extractor.info)
    features, theirs = generated.features, None if reference is None else reference.features
    if "frechet" in metrics and reference is not None:
        found.add("frechet_distance", formulas.frechet_distance(moments_of(features), reference.moments))
    if "score" in metrics and generated.logits is not None:
        _score(config, found, generated.logits)
    if "kid" in metrics and theirs is not None:
        fewer = min(len(features), len(theirs))
        size = formulas.subset_size(fewer, config.kid_subset_size)
        found.use("kid_subset_size", config.kid_subset_size, size, f"the smaller set has {fewer} images")
        found.used["kid_subsets"] = config.kid_subsets
        found.add("kernel_distance", *formulas.kernel_distance(features, theirs, config.kid_subsets, size, config.seed))
    if "precision_recall" in metrics and theirs is not None:
        found.used["neighbours"] = config.neighbours
        precision, recall = formulas.precision_recall(features, theirs, config.neighbours, extractor.device)
        found.add("precision", precision)
        found.add("recall", recall)
    if "class_accuracy" in metrics and generated.logits is not None and generated.labels is not None:
        found.add("class_accuracy", formulas.class_accuracy(generated.logits, generated.labels.values))
    return found


def measure_alone(config: EvalConfig, extractor: ExtractorInfo, seen: Extracted) -> dict[str, float]:
    """What a reference scores by itself: a yardstick for the score and class accuracy of generated images."""
    found = Findings(extractor)
    if seen.logits is not None:
        _score(config, found, seen.logits)
        if seen.labels is not None and label_obstacle(extractor, seen.logits.shape[1], seen.labels) is None:
            found.add("class_accuracy", formulas.class_accuracy(seen.logits, seen.labels.values))
    return found.values


def doubts(
    metrics: Sequence[Metric], extractor: ExtractorInfo, generated: Extracted, reference: Statistics | None
) -> Iterator[str]:
    """Sentences on what makes the numbers unreliable or hard to compare."""
    if extractor.kind == "inception" and not extractor.standard:
        yield f"{extractor.name} are not the published Inception weights: the numbers are not FID, IS or KID"
    yield from generated.unreadable
    if generated.image_size is None:
        yield "the generated images differ in size, perhaps other pictures lie among them: if not, set input_size"
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
    """An image size in words."""
    return "of several sizes" if size is None else f"{size[0]} x {size[1]} pixels"


def _score(config: EvalConfig, found: Findings, logits: Tensor) -> None:
    """Adds the class score of logits (N, C)."""
    splits = formulas.score_splits(len(logits), config.score_splits)
    found.use("score_splits", config.score_splits, splits, f"{len(logits)} images")
    mean, spread = formulas.class_score(logits, splits, config.seed)
    found.add("class_score", mean, spread if splits > 1 else None)
