"""Heads and MLP channels that depend on the noise level, and MLP tokens that depend on the image (DyDiT).

arXiv 2410.03456.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.method_names import ALIASES
from tokdyn.methods.base import Method, Pruning, Sizes, Stage, Traits
from tokdyn.methods.layers import Linear
from tokdyn.methods.registry import register_method
from tokdyn.ops import timestep_frequencies
from tokdyn.section import Count, Divisor


@register_method
class DynamicWidth(Method):
    """Settings of dynamic width: trained gates decide which parts of a block run, and in sampling the others do not.

    Every block has one gate for each attention head and for each of as many groups of MLP channels. These depend on the
    noise level only, and the first head and the first group are always on. A small network in every block decides for
    each image token whether it goes through the MLP. All gates start open. In training they are drawn with Gumbel noise
    and get their gradient through a sigmoid. `tokdyn.losses` then has the loss `2 (r - target)^2`, where r is the mean
    share of the FLOPs of attention and MLP whose gates are open.

    Attributes:
        target: share of the FLOPs of attention and MLP at which the loss holds the gates; at 1 there are no gates.
        heads: whether attention heads have gates.
        channels: whether groups of MLP channels have gates.
        tokens: whether tokens have gates in front of the MLP.
        token_input: the tensor that gates of tokens read: the input of the MLP ("mlp"), or, as in the public code of
            DyDiT, the tokens before norm and modulation ("stream"), which needs a model whose adapter declares where
            these are (tokdyn's own).
        embedding: width of a two-layer network between the noise level and the gates; None makes the gates linear in
            sines and cosines of the level. The paper uses the model's own timestep embedding here.
        temperature: temperature of the sigmoid through which gates get their gradient.
        warmup: number of training calls over which the target falls from 1 to `target`.
        loss_weight: weight of the loss.
    """

    aliases: ClassVar[tuple[str, ...]] = ALIASES["DynamicWidth"]

    target: float = Field(default=0.7, gt=0.0, le=1.0)
    heads: bool = True
    channels: bool = True
    tokens: bool = True
    token_input: Literal["mlp", "stream"] = "mlp"
    embedding: int | None = Field(default=None, ge=1)
    temperature: Divisor = 5.0
    warmup: Count = 0
    loss_weight: float = Field(default=1.0, ge=0.0)

    @model_validator(mode="after")
    def _does_something(self) -> DynamicWidth:
        if not (self.heads or self.channels or self.tokens):
            raise InputError(
                "heads, channels and tokens are all False, so DynamicWidth has no effect; set one of them to True."
            )
        return self

    def build(self, sizes: Sizes) -> WidthGates | None:
        """Build the gates; None if the target is 1.

        Raises:
            InputError: the model has a single head, and tokens have no gates either, so there is nothing to decide.
        """
        return None if self.target == 1.0 else WidthGates(self, sizes)

    def traits(self, depth: int) -> Traits:
        """Return the traits: the method decides about heads, channels and MLP tokens, and learns to meet a target."""
        stream = self.tokens and self.token_input == "stream"
        owned = {"attention heads": self.heads, "MLP channels": self.channels, "tokens of the MLP": self.tokens}
        return Traits(
            Stage.KERNEL,
            needs_level=self.heads or self.channels,
            owns={part: None for part, gated in owned.items() if gated},
            learns="FLOPs",
            target=self.target,
            reads="count" if self.tokens else "nothing",
            needs_sizes=True,
            diverges=True,
            masks_in_training=True,
            prunes=None if self.target == 1.0 else Pruning(self.heads, self.channels, self.tokens, stream),
            aligned="mlp" if self.tokens and self.token_input == "stream" else None,
            short="the first head and the first group of channels of every block are always on, and so is all that has "
            "no gates; raise target, or give more of heads, channels and tokens gates",
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Return one example each with all gates, without those of tokens, with those of heads and of tokens only."""
        return cls(), cls(tokens=False), cls(channels=False, tokens=False), cls(heads=False, channels=False)


class WidthGates(nn.Module):
    """The gates of heads and groups of MLP channels, by noise level, and of tokens, by their values.

    Args:
        method: the settings.
        sizes: the sizes of the model.

    Attributes:
        embedding: network between the sines and cosines of the noise level and the gates; None if there is none.
        heads: linear layer that computes depth (H - 1) logits; None if heads have no gates or H is 1.
        channels: the same for groups of MLP channels.
        tokens: for each block a network that computes a logit for every token; None if tokens have no gates.
        calls: number of calls in training so far, a scalar tensor.
    """

    FREQUENCIES = 256
    OPEN = 15.0  # initial logit, beyond the largest noise, 13.8, so that no gate is drawn shut at the start
    OPEN_TOKENS = 35.0
    SQUEEZE = 16  # D over the hidden width of the networks for tokens

    def __init__(self, method: DynamicWidth, sizes: Sizes) -> None:
        super().__init__()
        self.depth, self.gates = sizes.depth, sizes.heads - 1
        if not self.gates and not method.tokens:
            raise InputError(
                "DynamicWidth(tokens=False) has no effect on a model with a single attention head, which is always on; "
                "use tokens=True."
            )
        by_level = (method.heads or method.channels) and self.gates > 0
        width = method.embedding if by_level else None
        self.embedding = None if width is None else _embedding(self.FREQUENCIES, width)
        self.heads = self._by_level(width) if method.heads and self.gates else None
        self.channels = self._by_level(width) if method.channels and self.gates else None
        self.tokens = None
        if method.tokens:
            hidden = max(1, sizes.width // self.SQUEEZE)
            self.tokens = nn.ModuleList(_token_gate(sizes.width, hidden, self.OPEN_TOKENS) for _ in sizes.weights)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def _by_level(self, width: int | None) -> Linear:
        gates = Linear(width or self.FREQUENCIES, self.depth * self.gates)
        nn.init.zeros_(gates.weight)
        nn.init.constant_(gates.bias, self.OPEN)
        return gates

    def forward(self, level: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute the logits of heads and of groups of channels at noise levels (B,); a gate is open above 0.

        Returns:
            (B, depth, H - 1) logits, without the first head and group; None for a kind without gates.
        """
        frequencies = timestep_frequencies(1000.0 * level, self.FREQUENCIES)
        if self.embedding is not None:
            with torch.autocast(frequencies.device.type, enabled=False):
                first: Linear = self.embedding[0]  # type: ignore[assignment]
                frequencies = self.embedding(_fit(frequencies, first.weight))
        return self._logits(self.heads, frequencies), self._logits(self.channels, frequencies)

    @property
    def level_flops(self) -> int:
        """FLOPs of the gates of heads and channels at one noise level; a multiply-add is 2."""
        layers = [layer for layer in (self.heads, self.channels) if layer is not None]
        layers += [] if self.embedding is None else [layer for layer in self.embedding if isinstance(layer, Linear)]
        return sum(2 * layer.in_features * layer.out_features for layer in layers)

    def _logits(self, gates: Linear | None, frequencies: Tensor) -> Tensor | None:
        if gates is None:
            return None
        with torch.autocast(frequencies.device.type, enabled=False):
            logits: Tensor = gates(_fit(frequencies, gates.weight))
        return logits.view(-1, self.depth, self.gates).to(frequencies.device)

    def token_logits(self, block: int, x: Tensor) -> Tensor:
        """Compute the logits (B, N), or (T,), of the gates of a block's tokens (B, N, D), or (T, D)."""
        assert self.tokens is not None
        first = self.tokens[block][0]  # type: ignore[index]
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.tokens[block](_fit(x, first.weight))
        return logits.squeeze(-1).to(x.device)

    @property
    def token_flops(self) -> int:
        """FLOPs of the gate of one token; a multiply-add is 2."""
        first = self.tokens[0][0] if self.tokens is not None else None  # type: ignore[index]
        return 0 if first is None else 2 * first.out_features * (first.in_features + 1)

    def target(self, method: DynamicWidth) -> Tensor | float:
        """Return the share of the FLOPs at which the loss holds the gates now, during the warm-up or after it."""
        if not method.warmup:
            return method.target
        return 1.0 - (1.0 - method.target) * (self.calls / method.warmup).clamp(max=1.0)


def _fit(x: Tensor, weight: Tensor) -> Tensor:
    """Convert x to the dtype and device of a weight; to the dtype alone if the weight is on the meta device."""
    return x.to(weight.dtype) if weight.is_meta else x.to(weight)


def _embedding(inputs: int, width: int) -> nn.Sequential:
    """Build a two-layer network like the one by which DiT embeds its timestep."""
    return nn.Sequential(Linear(inputs, width), nn.SiLU(), Linear(width, width))


def _token_gate(width: int, hidden: int, bias: float) -> nn.Sequential:
    """Build the gate of a block's tokens; its last layer starts with zero weights, so that it is open for any token."""
    last = Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(Linear(width, hidden), nn.ReLU(), last)
