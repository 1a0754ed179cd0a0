"""Laws of the metrics: sides, order, batches and image sizes do not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.evaluate import EvalConfig, evaluate
from tokdyn.evaluate.features import choose, extract
from tokdyn.evaluate.images import open_images
from tokdyn.evaluate.metrics import (
    class_score,
    frechet_distance,
    kernel_distance,
    precision_recall,
    score_splits,
    subset_size,
)
from tokdyn.evaluate.networks import open_extractor
from tokdyn.evaluate.statistics import moments_of

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(1, 6)
COUNTS = st.integers(5, 30)


def features(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@given(COUNTS, COUNTS, WIDTHS, SEEDS)
def test_sides_can_be_exchanged(n: int, m: int, width: int, seed: int) -> None:
    one, other = features(n, width, seed), 2 * features(m, width, seed + 1) + 1
    forward = frechet_distance(moments_of(one), moments_of(other))
    backward = frechet_distance(moments_of(other), moments_of(one))
    # Eigenvalues that are zero up to rounding have roots of about sqrt(1e-16), times a scale of about 10.
    assert forward == pytest.approx(backward, abs=1e-5)
    assert forward > -1e-5
    assert precision_recall(one, other, 3, CPU) == precision_recall(other, one, 3, CPU)[::-1]
    fewer = min(n, m)
    one, other = one[:fewer], other[:fewer]
    assert kernel_distance(one, other, 1, fewer, 0)[0] == pytest.approx(
        kernel_distance(other, one, 1, fewer, 0)[0], abs=1e-9
    )


@given(COUNTS, WIDTHS, SEEDS, st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter(count: int, width: int, seed: int, random: Any) -> None:
    one, other = features(count, width, seed), features(count, width, seed + 1) + 0.5
    order = list(range(count))
    random.shuffle(order)
    shuffled = one[order]
    assert frechet_distance(moments_of(shuffled), moments_of(other)) == pytest.approx(
        frechet_distance(moments_of(one), moments_of(other)), abs=1e-5
    )
    assert precision_recall(shuffled, other, 3, CPU) == precision_recall(one, other, 3, CPU)
    assert class_score(shuffled, 1, 0)[0] == pytest.approx(class_score(one, 1, 0)[0])
    assert kernel_distance(shuffled, other, 1, count, 0)[0] == pytest.approx(
        kernel_distance(one, other, 1, count, 0)[0], abs=1e-9
    )


@given(COUNTS, WIDTHS, SEEDS, st.floats(-3, 3))
def test_a_shift_costs_its_squared_length(count: int, width: int, seed: int, shift: float) -> None:
    one = features(count, width, seed).double()
    moved = frechet_distance(moments_of(one), moments_of(one + shift))
    assert moved == pytest.approx(width * shift**2, abs=1e-5)


@given(st.integers(2, 10**6), st.integers(1, 100), st.integers(2, 5000))
def test_reductions_for_small_sets(count: int, splits: int, size: int) -> None:
    assert 1 <= score_splits(count, splits) <= splits
    assert score_splits(count, splits) in (1, splits) or count // score_splits(count, splits) >= 100
    assert 2 <= subset_size(count, size) <= min(size, count)
    assert subset_size(count, size) == size or count < size


@given(st.integers(1, 300), st.integers(2, 300), st.integers(0, 5))
def test_choice_is_repeatable_and_ascending(count: int, limit: int, seed: int) -> None:
    indices = choose(count, limit, seed)
    assert len(indices) == min(count, limit)
    assert (np.diff(indices) > 0).all()
    assert indices.tolist() == choose(count, limit, seed).tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_and_image_sizes_keep_the_order(kit: Any, judge: str, batch_size: int) -> None:
    """Images of nine sizes are more than may wait for others of their size at batch sizes 1 and 2."""
    sides = np.random.default_rng(0).integers(1, 10, 40) * 2
    images = [kit.draw(1, int(side), side=int(side))[0] for side in sides]
    source = open_images(kit.tree("images", {f"{i:02}.png": image for i, image in enumerate(images)}))
    extractor = open_extractor(EvalConfig(generated="images", extractor=judge, device="cpu"))
    extracted = extract("images", source, np.arange(40), extractor, batch_size, "raise")
    assert extracted is not None
    half = [image.reshape(2, len(image) // 2, 2, -1, 3).mean(axis=(1, 3)) for image in images]
    assert torch.allclose(extracted.features.double(), torch.from_numpy(kit.features(np.stack(half))), atol=1e-6)
    assert extracted.image_size is None


def test_folder_zip_and_npz_are_the_same_images(kit: Any, judge: str) -> None:
    images, other = kit.draw(20, 1), kit.npz("other", kit.draw(20, 2))
    files = {f"{i:02}.png": image for i, image in enumerate(images)}
    sources = [kit.tree("folder", files), kit.zip("archive", files), kit.npz("array", images)]
    values = [
        evaluate(EvalConfig(generated=source, reference=other, extractor=judge, device="cpu")).values
        for source in sources
    ]
    assert values[0] == values[1] == values[2]


def test_limit_chooses_the_same_images_again(kit: Any, judge: str) -> None:
    images, other = kit.npz("images", kit.draw(50, 1)), kit.npz("other", kit.draw(40, 2))

    def distance(**settings: Any) -> float:
        settings = {"generated": images, "reference": other, "extractor": judge, "metrics": "frechet"} | settings
        result = evaluate(EvalConfig(**settings, device="cpu"))
        assert result.generated_images == (settings.get("limit") or 50)
        assert result.reference_images == (settings.get("reference_limit") or 40)
        return result.values["frechet_distance[judge]"]

    assert distance(limit=30) == distance(limit=30)
    assert distance(limit=30) != distance(limit=30, seed=1)
    assert distance(reference_limit=20) != distance()
