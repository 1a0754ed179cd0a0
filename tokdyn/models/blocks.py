"""The parts of a diffusion transformer (arXiv 2212.09748), for dense (B, N, D) and packed (T, D) tokens alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.ops import dense_attention, packed_attention, timestep_frequencies
from tokdyn.ops.dispatch import synchronises
from tokdyn.ops.layers import gated_add, linear, modulated_norm
from tokdyn.tokens import Packing

_FREQUENCIES = 256
_PIPELINE_NULL_CLASS = 1000  # what diffusers' DiTPipeline passes for "no class", whatever the number of classes


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning.

    The modulation is computed for each sample, and spread over its tokens afterwards.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, mlp_norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.mlp_norm_eps = mlp_norm_eps
        self.stream = nn.Identity()  # lets methods see the tokens between attention and MLP

    def forward(self, x: Tensor, condition: Tensor, packing: Packing | None = None) -> Tensor:
        """Run attention, then the MLP, each on normed and modulated tokens and added through a gate.

        Args:
            x: (B, N, D), or (T, D) with a packing.
            condition: (B, D).
            packing: which rows of a packed x belong to which sample.

        Returns:
            The shape of x.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = gated_add(x, gate1, self.attn(modulated_norm(x, shift1, scale1, packing), packing), packing)
        x = self.stream(x)
        x = gated_add(x, gate2, self.mlp(modulated_norm(x, shift2, scale2, packing, self.mlp_norm_eps)), packing)
        return x


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing | None = None, key_bias: Tensor | None = None) -> Tensor:
        """Let every token attend to the tokens of its sample.

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
    """Two linear layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return linear(linear(x, self.fc1, gelu=True), self.fc2)


class FinalLayer(nn.Module):
    """adaLN and the projection of each token to its patch."""

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
    """A convolution that turns inputs into tokens, initialised like a linear layer."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, width, kernel, stride, padding)

    @torch.no_grad()
    def reset(self) -> None:
        """Initialise with Xavier over the flattened kernel, and zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(len(self.proj.weight), -1))
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, rows, columns) to (B, D, R, C)."""
        out: Tensor = self.proj(x)
        return out


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep frequencies through a two-layer MLP.

    It sees `scale * timestep + offset`, so that weights trained with other timesteps can be run with tokdyn's.
    """

    def __init__(self, width: int, shift: int = 0, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.shift, self.scale, self.offset = shift, scale, offset
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Map (B,) timesteps to (B, D); the MLP gets the frequencies in the type that the model computes in."""
        if (self.scale, self.offset) != (1.0, 0.0):
            timestep = self.scale * timestep.float() + self.offset
        frequencies = timestep_frequencies(timestep, _FREQUENCIES, self.shift)
        out: Tensor = self.mlp(frequencies.to(dtype))
        return out


class LabelEmbedder(nn.Module):
    """An embedding with one row per class, and a last one for no class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map (B,) labels in [0, classes] to (B, D); diffusers' null class 1000 also means no class.

        Raises:
            InputError: a label is out of range; it is only looked at where that does not make the host wait.
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
