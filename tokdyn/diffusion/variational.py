"""Compute the variational bound of arXiv 2102.09672, by which the learned variance is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF_BIN = 1.0 / 255.0  # images of 256 levels are spread over [-1, 1]
_SMALLEST_PROBABILITY = 1e-12


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Compute KL(N1 || N2) of diagonal Gaussians for each element, in nats. All arguments broadcast together."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference + torch.expm1(-difference) + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Compute the negative log-likelihood of 8-bit values under a Gaussian (arXiv 2006.11239, eq. 13).

    The Gaussian is integrated over the bin of each value; the first and the last bin reach to infinity. The normal
    distribution function is exact here; public implementations approximate it with a tanh.

    Args:
        x: (...) values in [-1, 1], each one of 256 levels.
        mean: (...) means.
        log_scale: (...) logarithms of the standard deviations.

    Returns:
        (...) in nats.
    """
    inverse = torch.exp(-log_scale)
    upper = inverse * (x - mean + _HALF_BIN)
    lower = inverse * (x - mean - _HALF_BIN)
    # P(lower < z < upper) is computed in the tail in which both probabilities are small, so that no digits cancel.
    swap = lower > 0
    middle = torch.special.ndtr(torch.where(swap, -lower, upper)) - torch.special.ndtr(torch.where(swap, -upper, lower))
    probability = torch.where(
        x < -0.999, torch.special.ndtr(upper), torch.where(x > 0.999, torch.special.ndtr(-lower), middle)
    )
    return -probability.clamp(min=_SMALLEST_PROBABILITY).log()


def bound_bits(
    x0: Tensor,
    posterior_mean: Tensor,
    posterior_log_variance: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    first: Tensor,
) -> Tensor:
    """Compute one term of the variational bound per sample, in bits per dimension (arXiv 2102.09672, eq. 4 to 7).

    Args:
        x0: (B, C, H, W) clean images.
        posterior_mean: (B, C, H, W) mean of q(x_{t-1} | x_t, x_0).
        posterior_log_variance: log variance of q(x_{t-1} | x_t, x_0); broadcasts to (B, C, H, W).
        mean: (B, C, H, W) mean of p(x_{t-1} | x_t).
        log_variance: (B, C, H, W) log variance of p(x_{t-1} | x_t).
        first: (B,) bool, True for samples with t = 0, whose term is the negative log-likelihood of x_0. The term of the
            others is a KL divergence.

    Returns:
        (B,) in bits per dimension.
    """
    divergence = gaussian_kl(posterior_mean, posterior_log_variance, mean, log_variance)
    likelihood = discretised_gaussian_nll(x0, mean, 0.5 * log_variance)
    term = torch.where(first.view(-1, *[1] * (x0.dim() - 1)), likelihood, divergence)
    return term.flatten(1).mean(dim=1) / math.log(2.0)
