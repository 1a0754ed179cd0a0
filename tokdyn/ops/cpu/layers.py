"""Modulated norms and gated residuals, sample by sample, and the layout of convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.ops import layers, torch_private
from tokdyn.ops.cpu.linear import empty_rows
from tokdyn.ops.dispatch import cpu_form, differentiable_gradients
from tokdyn.ops.precision import product_dtype
from tokdyn.tokens import Packing

_LONG_ROWS = 192  # rows per sample from which one call per sample beats indexing the modulation by token
_HALVES = (torch.bfloat16, torch.float16)
_WIDE = 96  # channels from which half-precision training is faster in channels-last maps


@cpu_form(layers.convolution_layout)
def convolution_layout(x: Tensor, narrowest: int) -> torch.memory_format | None:
    """Return the contiguous layout for training narrow maps in half precision.

    There, GroupNorm takes longer on channels-last maps than on contiguous ones, and convolutions take less time. The
    sum is less from 96 channels on.
    """
    half = x.dtype in _HALVES or torch.is_autocast_enabled("cpu")
    return torch.contiguous_format if torch.is_grad_enabled() and half and narrowest < _WIDE else None


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


@cpu_form(layers.gated_add)
def gated_add(x: Tensor, gate: Tensor, y: Tensor, packing: Packing | None = None) -> Tensor | None:
    """Add the gated rows of each sample, without casting all of y to the type of x first."""
    lengths = _by_sample(x, packing)
    if lengths is None:
        return None
    out: Tensor = _GatedAdd.apply(x, gate.to(x.dtype), y, lengths)
    return out


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


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(context, x, gate, y, lengths):  # type: ignore[no-untyped-def]
        to_gate, to_y = context.needs_input_grad[1:3]
        context.save_for_backward(gate if to_y else None, y if to_gate else None)
        context.lengths, context.kind = lengths, y.dtype
        if y.dtype != x.dtype:  # the copy may be written over
            out = y = y.to(x.dtype, memory_format=torch.contiguous_format)
        else:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        parts = (rows.reshape(-1, x.shape[-1]).split_with_sizes(lengths) for rows in (out, x, y))
        for o, a, b, g in zip(*parts, gate.unbind(0), strict=True):
            torch.addcmul(a, g, b, out=o)
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        gate, y = context.saved_tensors
        lengths, to_gate, to_y = context.lengths, None, None
        if torch.is_grad_enabled():  # in operators that have derivatives
            if y is not None:
                products = (gradient * y.to(gradient.dtype)).split_with_sizes(lengths)
                to_gate = torch.stack([each.sum(0) for each in products])
            if gate is not None:
                to_y = (gradient * _spread(gate, lengths)).to(context.kind)
            return gradient, to_gate, to_y, None
        slopes = gradient.split_with_sizes(lengths)
        scratch = gradient.new_empty(max(lengths), gradient.shape[1])
        if y is not None:
            to_gate = gradient.new_empty(len(lengths), gradient.shape[1])
            for s, b, sums in zip(slopes, y.split_with_sizes(lengths), to_gate.unbind(0), strict=True):
                torch.sum(torch.mul(s, b.to(s.dtype), out=scratch[: len(s)]), 0, out=sums)
        if gate is not None:
            to_y = torch.empty_like(gradient, dtype=context.kind)
            for s, g, t in zip(slopes, gate.unbind(0), to_y.split_with_sizes(lengths), strict=True):
                t.copy_(torch.mul(s, g, out=scratch[: len(s)]))
        return gradient, to_gate, to_y, None
