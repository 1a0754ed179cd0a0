"""GroupNorm (arXiv 1803.08494) with SiLU in one function, which keeps nothing of what lies between the two."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.device import by_hand
from tokdyn.ops.watched import is_watched

_EXACT = (torch.float32, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)
_PART = 1 << 18  # numbers that stay in the cache from one operation to the next

_norm = torch.ops.aten.native_group_norm
_norm_backward = torch.ops.aten.native_group_norm_backward
_silu_backward = torch.ops.aten.silu_backward


def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU(GroupNorm(x)).

    On CPU PyTorch's gradients of channels-last maps in half types take up to 20 times as long as those of contiguous
    ones, so these are our own.

    Args:
        x: (B, C, ...).
        norm: groups, weight, bias and epsilon.

    Returns:
        The shape and type of x.
    """
    known = x.dtype in _EXACT or (x.dtype in _HALVES and _is_channels_last(x))
    if not known or not torch.is_grad_enabled() or not by_hand(x) or is_watched(norm):
        return F.silu(norm(x))
    out: Tensor = _GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return out


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
        context.layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        context.kind = weight.dtype
        if x.dtype in _HALVES:
            weight, bias = weight.float(), bias.float()  # then mean and deviation are in fp32 too
        x = x.contiguous(memory_format=context.layout)
        context.sizes = len(x), x.shape[1], math.prod(x.shape[2:]), groups
        context.eps = eps
        normed, mean, deviation = _norm(x, weight, bias, *context.sizes, eps)
        context.save_for_backward(x, weight, bias, mean, deviation)
        return F.silu(normed, inplace=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight, bias, mean, deviation = context.saved_tensors
        gradient = gradient.contiguous(memory_format=context.layout)
        if x.dtype in _HALVES:
            slopes = _by_samples(gradient, x, weight, bias, mean, deviation)
            return (
                *(slope.to(kind) for slope, kind in zip(slopes, (x.dtype, *[context.kind] * 2), strict=True)),
                None,
                None,
            )
        normed = _norm(x, weight, bias, *context.sizes, context.eps)[0]
        gradient = _silu_backward(gradient, normed)
        wanted = context.needs_input_grad[:3]
        return *_norm_backward(gradient, x, mean, deviation, weight, *context.sizes, wanted), None, None


def _by_samples(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for channels-last maps, a few samples at a time, in fp32.

    With y = d (x - m) w + b, m and d = 1 / deviation of a group, and u the gradient of y:
    dw = sum d (x - m) u, db = sum u, dx = d (w u - A - B d (x - m)), A and B the means of w u and w u d (x - m).
    """
    groups, spread = mean.shape[1], x.shape[1] // mean.shape[1]
    rows, upper = (maps.permute(0, 2, 3, 1).flatten(1, 2) for maps in (x, gradient))
    count, width = rows.shape[1:]
    found, to_weight, to_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
    mean, deviation = (each.repeat_interleave(spread, 1) for each in (mean, deviation))  # by channel
    scale = deviation * weight
    shift = bias - mean * scale

    def by_group(sums: Tensor) -> Tensor:
        means = sums.view(len(sums), groups, spread).mean(2, keepdim=True) / count
        return means.expand(-1, -1, spread).reshape(sums.shape)

    samples = max(1, _PART // max(1, count * width))
    scratch, ones = x.new_empty(3, samples, count, width, dtype=torch.float32), weight.new_ones(1, 1, count)
    with torch.autocast("cpu", enabled=False):
        for place, a, u, m, d, s, h in zip(
            *(torch.split(t, samples) for t in (found, rows, upper, mean, deviation, scale, shift)), strict=True
        ):
            wide, slope, free = scratch[:, : len(a)]
            a = wide.copy_(a)
            torch.addcmul(h[:, None], a, s[:, None], out=free)
            _silu_backward(slope.copy_(u), free, grad_input=slope)
            torch.mul(slope, a, out=free)
            row = ones.expand(len(a), -1, -1)
            sums, moments = (torch.bmm(row, each).squeeze(1) for each in (slope, free))  # a product sums fastest
            moments = (moments - m * sums) * d
            to_bias += sums.sum(0)
            to_weight += moments.sum(0)
            lean = by_group(weight * moments) * d * d
            torch.addcmul((lean * m - by_group(weight * sums) * d)[:, None], a, -lean[:, None], out=free)
            place.copy_(free.addcmul_(slope, s[:, None]))
    return found.view(len(x), *x.shape[2:], width).permute(0, 3, 1, 2), to_weight, to_bias
