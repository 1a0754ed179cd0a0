"""The formulas, all of them torch-fidelity's, on features and logits."""

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

IMAGES_PER_SPLIT = 100  # a mean of exp(KL) over fewer images says more about their number than about them
DISTANCE_ROWS = 2500  # rows of the distance matrix at a time: 1 GB of float64 against 50,000 images


def frechet_distance(one: Moments, other: Moments) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), arXiv:1706.08500, eq. 6."""
    pairs = [{"mu": side.mean, "sigma": side.covariance} for side in (one, other)]
    return float(fid_statistics_to_metric(*pairs, verbose=False)[KEY_METRIC_FID])


def class_score(logits: Tensor, splits: int, seed: int) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))), arXiv:1606.03498: mean and standard deviation over `splits` random parts.

    Args:
        logits: (N, C), N at least `splits`.
        splits: Number of parts.
        seed: Of the shuffle before the division.
    """
    logits = logits.double()
    # A class that no image has any probability of would give log 0; exp(-700) is as good as none.
    logits = logits.clamp_min(logits.amax(dim=1, keepdim=True) - 700)
    found = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    return float(found[KEY_METRIC_ISC_MEAN]), float(found[KEY_METRIC_ISC_STD])


def score_splits(count: int, wanted: int) -> int:
    """As many of the parts wanted as leave 100 images in each, at least one."""
    return max(1, min(wanted, count // IMAGES_PER_SPLIT))


def kernel_distance(
    generated: Tensor, reference: Tensor, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x.y / F + 1)^3, arXiv:1801.01401, section 4, in float64.

    Args:
        generated: (N, F).
        reference: (M, F).
        subsets: Random subsets to average over.
        subset_size: Images in each, at most N and M.
        seed: Of their choice.

    Returns:
        Mean and standard deviation over the subsets.
    """
    found = kid_features_to_metric(
        generated.double(),
        reference.double(),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD])


def subset_size(smaller: int, wanted: int) -> int:
    """The size wanted, or half of the smaller set if that has fewer images, so that subsets still differ."""
    return wanted if smaller >= wanted else max(2, smaller // 2)


def precision_recall(
    generated: Tensor, reference: Tensor, neighbours: int, device: torch.device
) -> tuple[float, float]:
    """Precision and recall by k-nearest-neighbour balls, arXiv:1904.06991, eq. 1 and 2.

    Args:
        generated: (N, F), N greater than `neighbours`.
        reference: (M, F), M greater than `neighbours`.
        neighbours: k.
        device: Where distances are computed; float64, so that ties do not depend on the order of the images.
    """
    place = device if device.type == "cuda" else torch.device("cpu")
    found = prc_features_to_metric(
        generated.to(place, torch.float64),
        reference.to(place, torch.float64),
        prc_neighborhood=neighbours,
        prc_batch_size=DISTANCE_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return _fraction(found[KEY_METRIC_PRECISION], len(generated)), _fraction(found[KEY_METRIC_RECALL], len(reference))


def _fraction(value: float, count: int) -> float:
    """The fraction of `count` that was meant, without the rounding of float32."""
    return round(value * count) / count


def class_accuracy(logits: Tensor, labels: NDArray[np.int64]) -> float:
    """Fraction of images (N,) whose largest logit (N, C) is that of the class asked for."""
    return float((logits.argmax(dim=1).numpy() == labels).mean())
