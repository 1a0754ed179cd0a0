"""PSNR, SSIM and feature distance agree with independent formulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.bench.fidelity import feature_distance, psnr, ssim
from tokdyn.errors import InputError


def images(seed: int, batch: int = 3, size: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def _ssim_of_plane(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the definition window by window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (plane[row : row + 11, column : column + 11] for plane in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def test_ssim_agrees_with_its_definition() -> None:
    one, other = images(0, size=16), images(1, size=16)
    mixed = (one.float() * 0.7 + other.float() * 0.3).byte()
    wanted = [
        np.mean([_ssim_of_plane(a.numpy().astype(float), b.numpy().astype(float)) for a, b in zip(x, y, strict=True)])
        for x, y in zip(mixed, one, strict=True)
    ]
    assert ssim(mixed, one).tolist() == pytest.approx(wanted, abs=1e-9)


def test_psnr_of_a_known_error() -> None:
    one = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert psnr(one + 10, one).item() == pytest.approx(20 * np.log10(255 / 10))


@given(st.integers(0, 1000))
def test_equal_images_are_at_distance_zero(seed: int) -> None:
    one = images(seed, batch=2, size=12)
    assert psnr(one, one).isinf().all()
    assert ssim(one, one).tolist() == pytest.approx([1.0, 1.0])
    assert feature_distance(one.flatten(1).float(), one.flatten(1).float()) == 0.0


def test_unrelated_features_are_at_distance_one() -> None:
    torch.manual_seed(0)
    reference, unrelated = torch.randn(400, 16), torch.randn(400, 16)
    assert feature_distance(unrelated, reference) == pytest.approx(1.0, abs=0.05)
    assert feature_distance(reference + 0.01 * unrelated, reference) < 0.02


def test_unequal_shapes_small_images_and_single_features_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(3, 3, 16, 16\).*\(3, 3, 12, 12\)"):
        psnr(images(0, size=16), images(0, size=12))
    with pytest.raises(InputError, match=r"11x11 .*8x8"):
        ssim(images(0, size=8), images(0, size=8))
    with pytest.raises(InputError, match="got 1"):
        feature_distance(torch.zeros(1, 4), torch.zeros(1, 4))
