"""Normalisations that keep only what they need for gradients: RMSNorm (arXiv 1910.07467), GroupNorm with SiLU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.device import by_hand
from tokdyn.ops.precision import exact
from tokdyn.ops.watched import is_watched

_EXACT = (torch.float32, torch.float64)
_ROWS = 512  # that stay in the cache from one operation to the next


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 inside.

    On CPU PyTorch makes it of single operations, each of which keeps a tensor as large as x.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        The shape of x, in the wider of both types.
    """
    if not by_hand(x):
        kind = torch.promote_types(x.dtype, weight.dtype)
        return F.rms_norm(x.to(kind), weight.shape, weight.to(kind), eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU(GroupNorm(x)), without keeping what lies between the two.

    Args:
        x: (B, C, ...).
        norm: groups, weight, bias and epsilon.

    Returns:
        The shape and type of x.
    """
    if x.dtype not in _EXACT or not torch.is_grad_enabled() or not by_hand(x) or is_watched(norm):
        return F.silu(norm(x))
    out: Tensor = _GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, eps):  # type: ignore[no-untyped-def]
        x, wide = x.contiguous(), exact(weight)
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
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight, scale = context.saved_tensors
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


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        context.layout = torch.channels_last if last else torch.contiguous_format
        x = x.contiguous(memory_format=context.layout)
        context.sizes = len(x), x.shape[1], math.prod(x.shape[2:]), groups
        context.eps = eps
        normed, mean, deviation = torch.ops.aten.native_group_norm(x, weight, bias, *context.sizes, eps)
        context.save_for_backward(x, weight, bias, mean, deviation)
        return F.silu(normed, inplace=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, weight, bias, mean, deviation = context.saved_tensors
        normed = torch.ops.aten.native_group_norm(x, weight, bias, *context.sizes, context.eps)[0]
        gradient = torch.ops.aten.silu_backward(gradient, normed).contiguous(memory_format=context.layout)
        return *torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, deviation, weight, *context.sizes, context.needs_input_grad[:3]
        ), None, None  # fmt: skip


def _rows(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(torch.split(t.reshape(-1, t.shape[-1]), _ROWS) for t in tensors), strict=True)
