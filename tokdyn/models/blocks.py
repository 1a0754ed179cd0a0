"""The modules of a diffusion transformer (arXiv 2212.09748), for dense tokens (B, N, D) and packed tokens (T, D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.ops import dense_attention, packed_attention, timestep_frequencies
from tokdyn.ops.dispatch import synchronises
from tokdyn.ops.layers import gated_add, linear, modulated_norm
from tokdyn.tokens import Packing

_FREQUENCIES = 256
_PIPELINE_NULL_CLASS = 1000  # the label that diffusers' DiTPipeline gives for "no class" in every model


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning.

    Args:
        width: D.
        heads: H, a divisor of D.
        mlp_ratio: hidden width of the MLP over D.
        mlp_norm_eps: epsilon of the norm before the MLP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.mlp_norm_eps = mlp_norm_eps
        self.stream = nn.Identity()  # its calls show methods the tokens between attention and MLP

    def forward(self, x: Tensor, condition: Tensor, packing: Packing | None = None) -> Tensor:
        """Run attention, then the MLP; each gets normed and modulated tokens, and its result is added times a gate.

        Args:
            x: (B, N, D), or (T, D) with a packing.
            condition: (B, D), from which the modulation of each sample is computed.
            packing: the packing of packed tokens; None for dense ones.

        Returns:
            The shape of x.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = gated_add(x, gate1, self.attn(modulated_norm(x, shift1, scale1, packing), packing), packing)
        x = self.stream(x)
        x = gated_add(x, gate2, self.mlp(modulated_norm(x, shift2, scale2, packing, self.mlp_norm_eps)), packing)
        return x


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: D.
        heads: H, a divisor of D.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Let every token attend to the tokens of its sample.

        Args:
            x: (B, N, D), or (T, D) with a packing.
            packing: the packing of packed tokens; None for dense ones.
            key_bias: (B, N) or (T,), added to the logits of each key; None adds nothing.

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
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return linear(linear(x, self.fc1, gelu=True), self.fc2)


class FinalLayer(nn.Module):
    """adaLN, and the projection of each token to its patch.

    Args:
        width: width of the tokens.
        outputs: values of a patch.
        condition_width: D, width of the condition.
    """

    def __init__(self, width: int, outputs: int, condition_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (B, N, width) and (B, D) to (B, N, outputs)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        out: Tensor = self.linear(modulated_norm(x, shift, scale))
        return out


class CellEmbedder(nn.Module):
    """A convolution that turns the input into one token for each cell, initialised like a linear layer."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, width, kernel, stride, padding)

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise with Xavier over the flattened kernel, and zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(len(self.proj.weight), -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, rows, columns) to (B, width, R, C)."""
        out: Tensor = self.proj(x)
        return out


class TimestepEmbedder(nn.Module):
    """An MLP of two layers on sines and cosines of the timestep.

    Args:
        width: D.
        shift: see `tokdyn.ops.timestep_frequencies`.
        scale: factor of the timestep, so that weights trained with other timesteps can be used with tokdyn's.
        offset: added to the scaled timestep.
    """

    def __init__(self, width: int, shift: int = 0, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.shift, self.scale, self.offset = shift, scale, offset
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Map timesteps (B,) to (B, D); the MLP computes in `dtype`."""
        if (self.scale, self.offset) != (1.0, 0.0):
            timestep = self.scale * timestep.float() + self.offset
        frequencies = timestep_frequencies(timestep, _FREQUENCIES, self.shift)
        out: Tensor = self.mlp(frequencies.to(dtype))
        return out


class LabelEmbedder(nn.Module):
    """An embedding with one row per class, and a last row for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels (B,) to (B, D).

        Args:
            labels: integers from 0 to the number of classes, which means no class. If there are fewer than 1000
                classes, 1000 means no class too, as in diffusers' pipelines.

        Raises:
            InputError: a label is out of range; checked only if that causes no synchronisation.
        """
        null = self.embedding_table.num_embeddings - 1
        if null < _PIPELINE_NULL_CLASS:
            labels = torch.where(labels == _PIPELINE_NULL_CLASS, null, labels)
        if not synchronises(labels):
            wrong = labels[(labels < 0) | (labels > null)]
            if len(wrong):
                raise InputError(f"class_labels hold {int(wrong[0])}, expected 0 to {null}, where {null} is no class.")
        out: Tensor = self.embedding_table(labels)
        return out
