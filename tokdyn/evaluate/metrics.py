"""Compute the metrics from features and logits, with torch-fidelity's formulas."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity import (
    KEY_METRIC_FID,
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
)
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from tokdyn.evaluate.statistics import Moments

IMAGES_PER_SPLIT = 100  # with fewer, the class score depends on the number of images more than on their content
DISTANCE_ROWS = 2500  # rows of the distance matrix at a time: 1 GB of float64 against 50,000 images


def frechet_distance(one: Moments, other: Moments) -> float:
    """Compute the Frechet distance `|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` (arXiv 1706.08500, eq. 6)."""
    pairs = [{"mu": side.mean, "sigma": side.covariance} for side in (one, other)]
    return float(fid_statistics_to_metric(*pairs, verbose=False)[KEY_METRIC_FID])


def class_score(logits: Tensor, splits: int, seed: int) -> tuple[float, float]:
    """Compute the Inception Score `exp(E KL(p(y|x) || p(y)))` (arXiv 1606.03498) of any classifier.

    Args:
        logits: (N, C), N at least `splits`.
        splits: Number of random parts to divide the images into.
        seed: Seed of the division.

    Returns:
        Mean and standard deviation of the scores of the parts.
    """
    logits = logits.double()
    # A class with probability 0 for every image would give log 0, so the smallest probability is about exp(-700).
    logits = logits.clamp_min(logits.amax(dim=1, keepdim=True) - 700)
    result = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    return float(result[KEY_METRIC_ISC_MEAN]), float(result[KEY_METRIC_ISC_STD])


def score_splits(count: int, wanted: int) -> int:
    """Return `wanted`, reduced so that each part of `count` images has at least 100 of them; at least 1."""
    return max(1, min(wanted, count // IMAGES_PER_SPLIT))


def kernel_distance(
    generated: Tensor, reference: Tensor, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Compute the kernel distance: unbiased squared MMD with kernel `(x.y / F + 1)^3` (arXiv 1801.01401, section 4).

    Args:
        generated: (N, F) features of the generated images; computed in float64.
        reference: (M, F) features of the reference images.
        subsets: Number of random subsets to average over.
        subset_size: Images in each subset, at most N and M.
        seed: Seed of the choice of subsets.

    Returns:
        Mean and standard deviation over the subsets.
    """
    result = kid_features_to_metric(
        generated.double(),
        reference.double(),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return float(result[KEY_METRIC_KID_MEAN]), float(result[KEY_METRIC_KID_STD])


def subset_size(smaller: int, wanted: int) -> int:
    """Return the size of random subsets: `wanted`, or half of the smaller set's images if that set has fewer.

    With a whole set in each subset, the subsets would not differ.
    """
    return wanted if smaller >= wanted else max(2, smaller // 2)


def precision_recall(
    generated: Tensor, reference: Tensor, neighbours: int, device: torch.device
) -> tuple[float, float]:
    """Compute precision and recall by k-nearest-neighbour balls (arXiv 1904.06991, eq. 1 and 2).

    Args:
        generated: (N, F) features of the generated images, N greater than `neighbours`.
        reference: (M, F) features of the reference images, M greater than `neighbours`.
        neighbours: k.
        device: Device to compute the distances on, if it is a CUDA device; otherwise the CPU does. They are computed in
            float64, so that ties do not depend on the order of the images.

    Returns:
        Precision and recall, between 0 and 1.
    """
    device = device if device.type == "cuda" else torch.device("cpu")
    result = prc_features_to_metric(
        generated.to(device, torch.float64),
        reference.to(device, torch.float64),
        prc_neighborhood=neighbours,
        prc_batch_size=DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    precision, recall = result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]
    return _fraction(precision, len(generated)), _fraction(recall, len(reference))


def _fraction(value: float, count: int) -> float:
    """Return the share of `count` images that a float32 value stands for, without its rounding."""
    return round(value * count) / count


def class_accuracy(logits: Tensor, labels: NDArray[np.int64]) -> float:
    """Compute the share of images whose largest logit is that of their label, from logits (N, C) and labels (N,)."""
    return float((logits.argmax(dim=1).numpy() == labels).mean())
