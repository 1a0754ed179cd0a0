"""The parts of a diffusion transformer (arXiv 2212.09748), for dense (B, N, D) and packed (T, D) tokens alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.ops import dense_attention, packed_attention, timestep_frequencies
from tokdyn.ops.device import asking_waits, by_hand
from tokdyn.ops.linear import empty_rows, linear, product_dtype
from tokdyn.tokens import Packing

_FREQUENCIES = 256
_PIPELINE_NULL_CLASS = 1000  # what diffusers' DiTPipeline passes for "no class", whatever the number of classes
_LONG_ROWS = 192  # rows a sample from which one call a sample beats indexing the modulation by token


class CellEmbedder(nn.Module):
    """A convolution that turns inputs into tokens; filled like a linear layer."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, width, kernel, stride, padding)

    @torch.no_grad()
    def reset(self) -> None:
        """Xavier over the flattened kernel, zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(len(self.proj.weight), -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, rows, columns) to (B, D, R, C)."""
        out: Tensor = self.proj(x)
        return out


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep frequencies through a two-layer MLP.

    It sees scale * timestep + offset, so that weights that were trained to another clock can be told tokdyn's.
    """

    def __init__(self, width: int, shift: int = 0, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.shift, self.scale, self.offset = shift, scale, offset
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) timesteps to (B, D); the MLP gets the frequencies in the type that the model computes in."""
        if (self.scale, self.offset) != (1.0, 0.0):
            timestep = self.scale * timestep.float() + self.offset
        frequencies = timestep_frequencies(timestep, _FREQUENCIES, self.shift)
        out: Tensor = self.mlp(frequencies.to(dtype))
        return out


class LabelEmbedder(nn.Module):
    """One row per class and a last one for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) labels in [0, classes] to (B, D); diffusers' null class 1000 also means no class."""
        null = self.embedding_table.num_embeddings - 1
        if null < _PIPELINE_NULL_CLASS:
            labels = torch.where(labels == _PIPELINE_NULL_CLASS, null, labels)
        if not asking_waits(labels):
            wrong = labels[(labels < 0) | (labels > null)]
            if len(wrong):
                raise InputError(f"class_labels hold {int(wrong[0])}, expected 0 to {null}; {null} means no class.")
        out: Tensor = self.embedding_table(labels)
        return out


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None, key_bias: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x: (B, N, D), or (T, D) with a packing.
            packing: which rows of a packed x belong to which sample.
            key_bias: (B, N) or (T,), added to the logits of each key.

        Returns:
            The shape of x.
        """
        qkv = linear(x, self.qkv)
        if packing is None:
            mixed = dense_attention(qkv, self.heads, key_bias)
        else:
            mixed = packed_attention(qkv, self.heads, packing, key_bias)
        return linear(mixed, self.proj)


class Mlp(nn.Module):
    """Two linear layers around a tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return linear(linear(x, self.fc1, gelu=True), self.fc2)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning.

    The modulation is computed per sample and indexed by token after its Linear.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.mlp_norm_eps = mlp_norm_eps
        self.stream = nn.Identity()  # a place where methods see the tokens before norm and modulation

    def forward(self, x: Tensor, condition: Tensor, packing: Packing | None = None) -> Tensor:
        """One block.

        Args:
            x: (B, N, D), or (T, D) with a packing.
            condition: (B, D).
            packing: which rows of a packed x belong to which sample.

        Returns:
            The shape of x.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = self.stream(gated_add(x, gate1, self.attn(modulated_norm(x, shift1, scale1, packing), packing), packing))
        normed = modulated_norm(x, shift2, scale2, packing, self.mlp_norm_eps)
        return gated_add(x, gate2, self.mlp(normed), packing)


class FinalLayer(nn.Module):
    """adaLN and the projection of each token to its patch."""

    def __init__(self, width: int, outputs: int, condition_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, width) and (B, D) to (B, N, outputs)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        out: Tensor = self.linear(modulated_norm(x, shift, scale, None))
        return out


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, packing: Packing | None, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, with (B, D) modulation per sample; x is (B, N, D), or (T, D) with a packing.

    It comes in the type of x or, where it goes sample after sample, already in that of the products it goes into.
    """
    shift, scale = shift.to(x.dtype), (1 + scale).to(x.dtype)
    lengths = _by_sample(x, packing)
    if lengths is not None and by_hand(x):
        rows: Tensor = _ModulatedNorm.apply(x.reshape(-1, x.shape[-1]), shift, scale, lengths, eps, product_dtype(x))
        return rows.view(x.shape)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    scale, shift = (_for_rows(each, packing) for each in (scale, shift))
    return torch.addcmul(shift, normed, scale) if torch.is_grad_enabled() else normed.mul_(scale).add_(shift)


def gated_add(x: Tensor, gate: Tensor, y: Tensor, packing: Packing | None) -> Tensor:
    """X + gate y, with a (B, D) gate per sample; x and y are (B, N, D), or (T, D) with a packing."""
    gate, lengths = gate.to(x.dtype), _by_sample(x, packing)
    if lengths is not None and by_hand(x):
        out: Tensor = _GatedAdd.apply(x, gate, y, lengths)
        return out
    return torch.addcmul(x, _for_rows(gate, packing), y.to(x.dtype))


def _for_rows(modulation: Tensor, packing: Packing | None) -> Tensor:
    return modulation[:, None] if packing is None else modulation.index_select(0, packing.sample)


def _by_sample(x: Tensor, packing: Packing | None) -> tuple[int, ...] | None:
    """Rows of each sample, where it is fastest to go through them sample by sample."""
    if asking_waits(x) or (packing is None and torch.is_grad_enabled()):
        return None
    lengths = packing.lengths if packing is not None else (x.shape[1],) * len(x)
    return lengths if sum(lengths) >= _LONG_ROWS * len(lengths) else None


class _ModulatedNorm(torch.autograd.Function):
    """Sample after sample: the modulation is the weight and bias of the norm; written in the type it is read in."""

    @staticmethod
    def forward(context, x, shift, scale, lengths, eps, kind):  # type: ignore[no-untyped-def]
        if any(context.needs_input_grad):  # a view of what has room could not be changed in place
            out = torch.empty(x.shape, dtype=kind, device=x.device)
        else:
            out = empty_rows(len(x), x.shape[1], kind, x.device)
        found = []
        places, parts = (rows.split_with_sizes(lengths) for rows in (out, x))
        for place, part, weight, bias in zip(places, parts, scale, shift, strict=True):
            normed, *moments = torch.native_layer_norm(part, part.shape[-1:], weight, bias, eps)
            place.copy_(normed)
            found.append(moments)
        context.save_for_backward(x, shift, scale, *(torch.cat(each) for each in zip(*found, strict=True)))
        context.lengths = lengths
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        x, shift, scale, mean, deviation = context.saved_tensors
        wanted = [context.needs_input_grad[each] for each in (0, 2, 1)]
        to_x, to_shift, to_scale = torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale)
        by_rows = (rows.split_with_sizes(context.lengths) for rows in (gradient, x, mean, deviation, to_x))
        for g, part, m, d, place, *each in zip(*by_rows, scale, shift, to_scale, to_shift, strict=True):
            weight, bias, *sums = each
            slopes = _layer_norm_backward(g.to(part.dtype), part, part.shape[-1:], m, d, weight, bias, wanted)
            for slope, where, asked in zip(slopes, (place, *sums), wanted, strict=True):
                if asked:
                    where.copy_(slope)
        asked_x, asked_scale, asked_shift = wanted
        return (
            to_x if asked_x else None,
            to_shift if asked_shift else None,
            to_scale if asked_scale else None,
            *(None, None, None),
        )


_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


class _GatedAdd(torch.autograd.Function):
    """Sample after sample, which need not write down the gate of every row, nor y in the type of x."""

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
    @torch.autograd.function.once_differentiable
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        gate, y = context.saved_tensors
        lengths, to_gate, to_y = context.lengths, None, None
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
