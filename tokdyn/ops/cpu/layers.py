"""Modulated norms, sample by sample, and the GroupNorm of small maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops import layers, torch_private
from tokdyn.ops.cpu.linear import empty_rows
from tokdyn.ops.dispatch import cpu_form, differentiable_gradients
from tokdyn.ops.precision import product_dtype
from tokdyn.tokens import Packing

_LONG_ROWS = 192  # rows per sample from which one call per sample beats indexing the modulation by token
_SMALL_MAP = 256  # cells up to which GroupNorm takes two to four times as long in bf16 as in fp32


@cpu_form(layers.modulated_norm)
def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, packing: Packing | None = None, eps: float = 1e-6
) -> Tensor | None:
    """Apply the modulation as weight and bias of the norm of each sample, and write the type that the product reads."""
    lengths = _by_sample(x, packing)
    if lengths is None or torch_private.layer_norm is None or torch_private.layer_norm_backward is None:
        return None
    shift, scale = shift.to(x.dtype), (1 + scale).to(x.dtype)
    rows: Tensor = _ModulatedNorm.apply(x.reshape(-1, x.shape[-1]), shift, scale, lengths, eps, product_dtype(x))
    return rows.view(x.shape)


@cpu_form(layers.group_norm_silu)
def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor | None:
    """Compute small maps in fp32, of which PyTorch's kernel for bf16 gets rows too short to work on."""
    small = x.dtype == torch.bfloat16 and x[0, 0].numel() <= _SMALL_MAP
    if not small or norm.weight is None or norm.weight.dtype != torch.float32:
        return None
    return F.silu(norm(x.float())).to(x.dtype)


def _by_sample(x: Tensor, packing: Packing | None) -> tuple[int, ...] | None:
    """Return the rows of each sample where it is fastest to go through them sample by sample."""
    if packing is None and torch.is_grad_enabled():
        return None
    lengths = packing.lengths if packing is not None else (x.shape[1],) * len(x)
    return lengths if sum(lengths) >= _LONG_ROWS * len(lengths) else None


def _spread(modulation: Tensor, lengths: Sequence[int]) -> Tensor:
    return modulation.repeat_interleave(torch.tensor(lengths), dim=0, output_size=sum(lengths))


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(context, x, shift, scale, lengths, eps, kind):  # type: ignore[no-untyped-def]
        if any(context.needs_input_grad):  # a hook may change the result in place, which a view does not allow
            out = torch.empty(x.shape, dtype=kind, device=x.device)
        else:
            out = empty_rows(len(x), x.shape[1], kind, x.device)
        found = []
        places, parts = (rows.split_with_sizes(lengths) for rows in (out, x))
        for place, part, weight, bias in zip(places, parts, scale, shift, strict=True):
            normed, *moments = torch_private.layer_norm(part, part.shape[-1:], weight, bias, eps)
            place.copy_(normed)
            found.append(moments)
        context.save_for_backward(x, shift, scale, *(torch.cat(each) for each in zip(*found, strict=True)))
        context.lengths, context.eps, context.kind = lengths, eps, kind
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, shift, scale, mean, deviation = context.saved_tensors
        if torch.is_grad_enabled():
            arguments = x, shift, scale, context.lengths, context.eps, context.kind
            return differentiable_gradients(_plain_norm, arguments, gradient)
        wanted = [context.needs_input_grad[each] for each in (0, 2, 1)]
        to_x, to_shift, to_scale = torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale)
        by_rows = (rows.split_with_sizes(context.lengths) for rows in (gradient, x, mean, deviation, to_x))
        for g, part, m, d, place, *each in zip(*by_rows, scale, shift, to_scale, to_shift, strict=True):
            weight, bias, *sums = each
            slopes = torch_private.layer_norm_backward(
                g.to(part.dtype), part, part.shape[-1:], m, d, weight, bias, wanted
            )
            for slope, target, asked in zip(slopes, (place, *sums), wanted, strict=True):
                if asked:
                    target.copy_(slope)
        asked_x, asked_scale, asked_shift = wanted
        return (
            to_x if asked_x else None,
            to_shift if asked_shift else None,
            to_scale if asked_scale else None,
            *(None, None, None),
        )


def _plain_norm(
    x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int], eps: float, kind: torch.dtype
) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return (normed * _spread(scale, lengths) + _spread(shift, lengths)).to(kind)
