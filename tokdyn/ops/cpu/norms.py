"""RMSNorm, and GroupNorm with SiLU, that keep only what their gradients need."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops import layers, torch_private
from tokdyn.ops.dispatch import cpu_form, differentiable_gradients
from tokdyn.ops.precision import exact

_ROWS = 512  # rows that stay in the cache from one operation to the next
_PART = 1 << 18  # elements that do
_EXACT = (torch.float32, torch.float64)
_HALVES = (torch.bfloat16, torch.float16)
_WIDE = 96  # channels from which half-precision training is faster in channels-last maps


@cpu_form(layers.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """Apply RMSNorm in fp32 or more, row by row; PyTorch's form keeps a tensor as large as x for every operation."""
    out: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, eps):  # type: ignore[no-untyped-def]
        wide = exact(weight)
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.promote_types(out.dtype, torch.float32), device=x.device)
        for a, found, s in _rows(x, out, scale):
            a = a.to(s.dtype)
            torch.linalg.vector_norm(a, dim=-1, keepdim=True, out=s)
            s.square_().div_(a.shape[-1]).add_(eps).rsqrt_()
            normed = torch.mul(a, s, out=found if found.dtype == s.dtype else None).mul_(wide)
            if normed is not found:
                found.copy_(normed)
        context.save_for_backward(x, weight, scale)
        context.eps = eps
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight, scale = context.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(_plain_rms_norm, (x, weight, context.eps), gradient)
        wide = weight.to(scale.dtype)
        to_x, to_weight = torch.empty_like(x), torch.zeros_like(wide) if context.needs_input_grad[1] else None
        for a, upper, found, s in _rows(x, gradient, to_x, scale):
            normed, upper = a * s, upper.to(s.dtype)
            along = upper * normed
            if to_weight is not None:
                to_weight += along.sum(0)
            mean = torch.mv(along, wide).div_(a.shape[-1])
            slope = torch.mul(upper, wide, out=found if found.dtype == s.dtype else None)
            slope = slope.sub_(normed.mul_(mean[:, None])).mul_(s)
            if slope is not found:
                found.copy_(slope)
        return to_x, None if to_weight is None else to_weight.to(weight.dtype), None


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = exact(x)
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return out.to(torch.promote_types(x.dtype, weight.dtype))


def _rows(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(torch.split(t.reshape(-1, t.shape[-1]), _ROWS) for t in tensors), strict=True)


@cpu_form(layers.convolution_layout)
def convolution_layout(x: Tensor, narrowest: int) -> torch.memory_format | None:
    """Return the contiguous layout for training narrow maps in half precision.

    There, GroupNorm takes longer on channels-last maps than on contiguous ones, and convolutions take less time. The
    sum is less from 96 channels on.
    """
    half = x.dtype in _HALVES or torch.is_autocast_enabled("cpu")
    return torch.contiguous_format if torch.is_grad_enabled() and half and narrowest < _WIDE else None


@cpu_form(layers.group_norm_silu)
def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor | None:
    """Apply GroupNorm and SiLU with gradients, keeping only x.

    PyTorch's gradients of channels-last maps in half types take up to 20 times as long as those of contiguous ones.
    """
    takes = x.dtype in _EXACT or (x.dtype in _HALVES and _is_channels_last(x))
    if not takes or not torch.is_grad_enabled() or not norm.affine or torch_private.has_hooks(norm):
        return None
    if None in (torch_private.group_norm, torch_private.group_norm_backward, torch_private.silu_backward):
        return None
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    weight: Tensor = norm.weight
    bias: Tensor = norm.bias
    if x.dtype in _HALVES:
        weight, bias = weight.float(), bias.float()  # then mean and deviation are in fp32 too
    out: Tensor = _GroupNormSiLU.apply(x.contiguous(memory_format=layout), weight, bias, norm.num_groups, norm.eps)
    return out


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
        context.layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        context.sizes = len(x), x.shape[1], math.prod(x.shape[2:]), groups
        context.eps = eps
        normed, mean, deviation = torch_private.group_norm(x, weight, bias, *context.sizes, eps)
        context.save_for_backward(x, weight, bias, mean, deviation)
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight, bias, mean, deviation = context.saved_tensors
        if torch.is_grad_enabled():
            arguments = x, weight, bias, context.sizes[-1], context.eps
            return differentiable_gradients(_plain_group_norm_silu, arguments, gradient)
        gradient = gradient.contiguous(memory_format=context.layout)
        if x.dtype in _HALVES:
            to_x, *others = _by_samples(gradient, x, weight, bias, mean, deviation)
            return to_x, *others, None, None
        normed = torch_private.group_norm(x, weight, bias, *context.sizes, context.eps)[0]
        gradient = torch_private.silu_backward(gradient, normed)
        wanted = context.needs_input_grad[:3]
        slopes = torch_private.group_norm_backward(gradient, x, mean, deviation, weight, *context.sizes, wanted)
        return *slopes, None, None


def _plain_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x.to(weight.dtype), groups, weight, bias, eps)).to(x.dtype)


def _by_samples(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of x, weight and bias for channels-last maps, a few samples at a time, in fp32.

    With `y = d (x - m) w + b`, m the mean of a group and d one over its deviation, and u the gradient of y:
    `dw = sum d (x - m) u`, `db = sum u` and `dx = d (w u - A - B d (x - m))`, where A is the mean of `w u` and B that
    of `w u d (x - m)`.
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
            torch_private.silu_backward(slope.copy_(u), free, grad_input=slope)
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
