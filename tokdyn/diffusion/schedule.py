"""Compute the variance-preserving noise schedule: its betas, and the constants derived from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tokdyn.diffusion.settings import BetaSchedule

_BETA_START, _BETA_END = 1e-4, 0.02  # over 1000 steps, arXiv 2006.11239
_MAX_BETA = 0.999


def betas(kind: BetaSchedule, steps: int) -> Tensor:
    """Return the noise variance added at each of ``steps`` steps.

    The linear schedules were published for 1000 steps. For another number, their first and last beta are multiplied by
    ``1000 / steps`` (arXiv 2102.09672), so that the process ends in noise whatever its length.

    Args:
        kind: ``linear`` (arXiv 2006.11239), ``scaled_linear`` (linear in the square root) or ``squaredcos_cap_v2``
            (cosine, arXiv 2102.09672 equation 17).
        steps: length T of the process.

    Returns:
        (T,) float64, at most 0.999.
    """
    scale = 1000.0 / steps
    if kind == "linear":
        values = torch.linspace(scale * _BETA_START, scale * _BETA_END, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        ends = math.sqrt(scale * _BETA_START), math.sqrt(scale * _BETA_END)
        values = torch.linspace(*ends, steps, dtype=torch.float64).square()
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        values = 1.0 - alpha_bar[1:] / alpha_bar[:-1]
    return values.clamp(max=_MAX_BETA)


@dataclass(frozen=True)
class NoiseTables:
    """The constants of the process at each timestep, all (T,) float64. Equation numbers are those of arXiv 2006.11239.

    Attributes:
        beta: variance added by step t.
        alpha: sqrt(abar_t), the share of the clean image in x_t (eq. 4).
        sigma: sqrt(1 - abar_t), the share of the noise in x_t (eq. 4).
        posterior_x0: coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (eq. 7).
        posterior_xt: coefficient of x_t in that mean (eq. 7).
        log_min: log of the posterior variance (eq. 7), the smallest that the model may predict. At t = 0, where that is
            -inf, the value of t = 1 is used, as in arXiv 2102.09672.
        log_max: log beta_t, the largest variance that the model may predict.
    """

    beta: Tensor
    alpha: Tensor
    sigma: Tensor
    posterior_x0: Tensor
    posterior_xt: Tensor
    log_min: Tensor
    log_max: Tensor


@lru_cache(maxsize=32)
def noise_tables(kind: BetaSchedule, steps: int, device: torch.device) -> NoiseTables:
    """Return the constants of the process on a device, cached.

    They are ordinary tensors even if this is first called in inference mode, so that training can use them later.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        return _noise_tables(betas(kind, steps), device)


def _noise_tables(beta: Tensor, device: torch.device) -> NoiseTables:
    """Compute the constants from the betas (T,)."""
    alpha_bar = torch.cumprod(1.0 - beta, dim=0)
    previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    variance = beta * (1.0 - previous) / (1.0 - alpha_bar)
    log_min = variance[1:].log()
    tables = (
        beta,
        alpha_bar.sqrt(),
        (1.0 - alpha_bar).sqrt(),
        beta * previous.sqrt() / (1.0 - alpha_bar),
        (1.0 - previous) * (1.0 - beta).sqrt() / (1.0 - alpha_bar),
        torch.cat([log_min[:1], log_min]),
        beta.log(),
    )
    return NoiseTables(*(table.to(device) for table in tables))
