"""Every metric against its definition, computed here independently, and against torch-fidelity's own entry point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from tokdyn.evaluate import EvalConfig, EvalResult, evaluate

# Features reach the formulas as float32; everything after them is float64.
CLOSE = 1e-5


def root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the square root of a symmetric positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the squared Wasserstein distance of Gaussians with the moments of (N, F) and (M, F), in symmetric form."""
    first, second = np.cov(one.T), np.cov(other.T)
    cross = root(root(first) @ second @ root(first))
    return float(((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * cross))


def unbiased_mmd(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the squared MMD with the kernel (x.y / F + 1)^3, summed pair by pair."""

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def own_pairs(rows: NDArray[np.float64]) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in one for y in other]
    return own_pairs(one) + own_pairs(other) - 2 * sum(across) / len(across)


def share_in_balls(points: NDArray[np.float64], centres: NDArray[np.float64], neighbours: int) -> float:
    """Return the fraction of points that are as near to a centre as its k-th nearest other centre."""
    radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[neighbours] for centre in centres]
    return float(np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points]))


def score(logits: NDArray[np.float64]) -> float:
    """Return exp of the mean KL divergence of p(y|x) from p(y)."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))


def run(**settings: Any) -> EvalResult:
    return evaluate(EvalConfig(**{"device": "cpu", **settings}))


@pytest.mark.parametrize("counts", [(60, 40), (40, 60)])
def test_metrics_equal_their_definitions(kit: Any, judge: str, counts: tuple[int, int]) -> None:
    ours, theirs = kit.draw(counts[0], 1, high=200), kit.draw(counts[1], 2, low=30)
    fewer = min(counts)
    result = run(
        generated=kit.npz("ours", ours),
        reference=kit.npz("theirs", theirs),
        extractor=judge,
        batch_size=7,
        kid_subset_size=fewer,  # the smaller set is then always used whole
        kid_subsets=400,
        neighbours=2,
    )
    mine, other = kit.features(ours), kit.features(theirs)
    assert result.values["frechet_distance[judge]"] == pytest.approx(frechet(mine, other), abs=CLOSE)
    assert result.values["class_score[judge]"] == pytest.approx(score(kit.logits(ours)), abs=CLOSE)
    assert result.reference_values["class_score[judge]"] == pytest.approx(score(kit.logits(theirs)), abs=CLOSE)
    assert result.values["precision[judge]"] == pytest.approx(share_in_balls(mine, other, 2))
    assert result.values["recall[judge]"] == pytest.approx(share_in_balls(other, mine, 2))
    # Subsets of the larger set scatter around the value of all pairs; four standard errors of their mean.
    error = 4 * result.spread["kernel_distance[judge]"] / np.sqrt(400)
    assert result.values["kernel_distance[judge]"] == pytest.approx(unbiased_mmd(mine, other), abs=error)
    assert (result.generated_images, result.reference_images) == counts


def test_kernel_distance_of_whole_sets_is_exact(kit: Any, judge: str) -> None:
    ours, theirs = kit.draw(9, 3), kit.draw(9, 4, high=120)
    result = run(
        generated=kit.npz("ours", ours),
        reference=kit.npz("theirs", theirs),
        extractor=judge,
        metrics="kid",
        kid_subset_size=9,
        kid_subsets=3,
    )
    expected = unbiased_mmd(kit.features(ours), kit.features(theirs))
    assert result.values["kernel_distance[judge]"] == pytest.approx(expected, abs=1e-6)
    assert result.spread["kernel_distance[judge]"] == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_two_known_gaussians(kit: Any, judge: str) -> None:
    """Independent features of variances v and w whose means differ by d have |d|^2 + sum (sqrt v - sqrt w)^2."""
    corners = np.array(np.meshgrid(*[[-1, 1]] * 12)).reshape(12, -1).T  # 4096 points of zero covariance off-diagonal
    ours, theirs = (128 + 40 * corners).astype(np.uint8), (148 + 20 * corners).astype(np.uint8)
    shape = (-1, 2, 2, 3)
    result = run(
        generated=kit.npz("ours", ours.reshape(shape)),
        reference=kit.npz("theirs", theirs.reshape(shape)),
        extractor=judge,
        metrics="frechet",
        batch_size=512,
    )
    unbiased = 4096 / 4095
    expected = 12 * (20 / 255) ** 2 + 12 * unbiased * (40 / 255 - 20 / 255) ** 2
    assert result.values["frechet_distance[judge]"] == pytest.approx(expected, rel=CLOSE)


def test_identical_sets(kit: Any, judge: str) -> None:
    images = kit.npz("images", kit.draw(50, 5))
    result = run(generated=images, reference=images, extractor=judge, kid_subset_size=50, kid_subsets=2)
    assert result.values["frechet_distance[judge]"] == pytest.approx(0, abs=1e-9)
    assert result.values["precision[judge]"] == result.values["recall[judge]"] == 1
    # The unbiased estimate leaves out the pairs of an image with itself on two sides of three, so it is below zero.
    assert result.values["kernel_distance[judge]"] < 0
    assert result.values["class_score[judge]"] == result.reference_values["class_score[judge]"]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1e4, 4.0)])
def test_score_lies_between_one_and_the_number_of_classes(kit: Any, scale: float, expected: float) -> None:
    """Uniform probabilities score 1; certain ones score the number of classes if each occurs equally often."""
    images = np.zeros((40, 3, 2, 2), dtype=np.uint8)
    images.reshape(40, 12)[np.arange(40), np.arange(40) % 4] = 255
    result = run(
        generated=kit.npz("sure", images.transpose(0, 2, 3, 1).copy()),
        extractor=str(kit.torchscript("sure", scale=scale)),
        metrics="score",
    )
    assert result.values["class_score[sure]"] == pytest.approx(expected, rel=1e-6)


def test_score_of_a_class_that_never_occurs(kit: Any) -> None:
    """Logits are so far apart that probabilities are exactly zero; three classes occur, so the score is 3."""
    images = np.zeros((30, 3, 2, 2), dtype=np.uint8)
    images.reshape(30, 12)[np.arange(30), np.arange(30) % 3] = 255
    result = run(
        generated=kit.npz("sure", images.transpose(0, 2, 3, 1).copy()),
        extractor=str(kit.torchscript("sure", scale=1e4)),
        metrics="score",
    )
    assert result.values["class_score[sure]"] == pytest.approx(3, rel=1e-6)


def test_score_over_parts(kit: Any, judge: str) -> None:
    """The mean of three parts of 100 is below the score of all images, and the spread is that of three scores."""
    images = kit.npz("images", kit.draw(300, 6))
    whole = run(generated=images, extractor=judge, metrics="score", score_splits=1)
    parts = run(generated=images, extractor=judge, metrics="score", score_splits=3)
    assert "class_score[judge]" not in whole.spread
    assert 0 < parts.spread["class_score[judge]"] < 0.1
    assert parts.values["class_score[judge]"] < whole.values["class_score[judge]"]


class Images(torch.utils.data.Dataset[Tensor]):
    """A data set of images in the form that torch-fidelity takes."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class Registered(torch_fidelity.FeatureExtractorBase):
    """Pixel values as an extractor of torch-fidelity."""

    def __init__(self, name: str, features_list: list[str], **settings: object) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, str]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = images.float().flatten(1) / 255
        outputs = {"features": features, "logits": features[:, :4]}
        return tuple(outputs[name] for name in self.features_list)


def test_metrics_equal_those_of_torch_fidelity(kit: Any, judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "tokdyn-test", Registered)
    ours, theirs = kit.draw(220, 7, high=220), kit.draw(150, 8, low=20)
    expected = torch_fidelity.calculate_metrics(
        input1=Images(ours),
        input2=Images(theirs),
        feature_extractor="tokdyn-test",
        **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
        isc_splits=2,
        kid_subsets=20,
        kid_subset_size=100,
        rng_seed=11,
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        verbose=False,
    )
    result = run(
        generated=kit.npz("ours", ours),
        reference=kit.npz("theirs", theirs),
        extractor=judge,
        score_splits=2,
        kid_subsets=20,
        kid_subset_size=100,
        seed=11,
    )
    names = {
        "frechet_distance": torch_fidelity.KEY_METRIC_FID,
        "class_score": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "kernel_distance": torch_fidelity.KEY_METRIC_KID_MEAN,
        "precision": torch_fidelity.KEY_METRIC_PRECISION,
        "recall": torch_fidelity.KEY_METRIC_RECALL,
    }
    # torch-fidelity sums in float32 here.
    assert {name: result.values[f"{name}[judge]"] for name in names} == pytest.approx(
        {name: expected[key] for name, key in names.items()}, abs=CLOSE
    )
    assert result.spread["class_score[judge]"] == pytest.approx(expected[torch_fidelity.KEY_METRIC_ISC_STD], abs=CLOSE)
    assert result.spread["kernel_distance[judge]"] == pytest.approx(
        expected[torch_fidelity.KEY_METRIC_KID_STD], abs=CLOSE
    )
