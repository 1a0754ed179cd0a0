"""RMSNorm (arXiv 1910.07467) that keeps only what it needs for gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.ops.device import by_hand
from tokdyn.ops.precision import exact

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


def _rows(*tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(torch.split(t.reshape(-1, t.shape[-1]), _ROWS) for t in tensors), strict=True)
