"""Heads and MLP channels that depend on the noise level, and MLP tokens that depend on the image.

Source: DyDiT, arXiv 2410.03456.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Pruning, Sizes, Stage, Traits
from tokdyn.methods.registry import register_method
from tokdyn.ops import timestep_frequencies


@register_method
class DynamicWidth(Method):
    """Settings of dynamic width: gates are trained with the model, and in sampling what is off is not computed.

    Every block has gates for its attention heads and for as many groups of MLP channels. They depend on the noise level
    alone; the first of each is always on. A small network in every block decides for each image token whether the MLP
    sees it. All gates start open. Training draws them with Gumbel noise and passes their gradient through a sigmoid;
    `tokdyn.losses` holds 2 (r - target)^2, r the share of the FLOPs of attention and MLP that ran on average.

    Attributes:
        target: share of the FLOPs of attention and MLP that training ends up with; at 1 everything stays on.
        heads: let the noise level choose attention heads.
        channels: let the noise level choose groups of MLP channels.
        tokens: let each token choose whether the MLP sees it.
        token_input: what the gates of tokens see: what the MLP gets, or, as in the public code of DyDiT, the tokens
            before norm and modulation, in models whose adapter says where those are (tokdyn's own).
        embedding: width of a two-layer network between the noise level and its gates, as in the paper, where it is the
            model's own timestep embedding; None lets gates be linear in the sines and cosines of the level.
        temperature: of the sigmoid through which gates get their gradient.
        warmup: calls in training over which the target falls from 1 to `target`.
        loss_weight: of the FLOPs loss.
    """

    aliases: ClassVar[tuple[str, ...]] = ("dydit", "width")

    target: float = Field(default=0.7, gt=0.0, le=1.0)
    heads: bool = True
    channels: bool = True
    tokens: bool = True
    token_input: Literal["mlp", "stream"] = "mlp"
    embedding: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=5.0, gt=0.0)
    warmup: int = Field(default=0, ge=0)
    loss_weight: float = Field(default=1.0, ge=0.0)

    @model_validator(mode="after")
    def _does_something(self) -> DynamicWidth:
        if not (self.heads or self.channels or self.tokens):
            raise InputError("heads, channels and tokens are all off, so DynamicWidth has no effect; set one of them.")
        return self

    def build(self, sizes: Sizes) -> WidthGates | None:
        """The gates; None where everything stays on."""
        return None if self.target == 1.0 else WidthGates(self, sizes)

    def traits(self, depth: int) -> Traits:
        """It owns the masks and learns to meet a FLOPs target."""
        stream = self.tokens and self.token_input == "stream"
        owned = {"attention heads": self.heads, "MLP channels": self.channels, "tokens of the MLP": self.tokens}
        return Traits(
            Stage.KERNEL,
            needs_level=self.heads or self.channels,
            owns={thing: None for thing, chosen in owned.items() if chosen},
            learns="FLOPs",
            target=self.target,
            reads="count" if self.tokens else "nothing",
            needs_sizes=True,
            diverges=True,
            prunes=None if self.target == 1.0 else Pruning(self.heads, self.channels, self.tokens, stream),
            aligned="mlp" if self.tokens and self.token_input == "stream" else None,
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Choose everything, no tokens, heads alone, and tokens alone."""
        return cls(), cls(tokens=False), cls(channels=False, tokens=False), cls(heads=False, channels=False)


class WidthGates(nn.Module):
    """Gates of heads and channel groups, linear in the sines and cosines of the noise level, and of tokens.

    Attributes:
        embedding: a network that the noise level goes through first; None where there is none.
        heads: makes (B, depth (H - 1)) logits; None where heads are not chosen, or there is one only.
        channels: the same for groups of MLP channels.
        tokens: for each block a network that makes a logit of every token; None where tokens are not chosen.
        calls: how often it was called in training.
    """

    FREQUENCIES = 256
    OPEN = 15.0  # beyond the noise, which ends at 13.8: at the start nothing is drawn shut
    OPEN_TOKENS = 35.0
    SQUEEZE = 16  # D over the hidden width of the networks for tokens

    def __init__(self, method: DynamicWidth, sizes: Sizes) -> None:
        super().__init__()
        self.depth, self.gates = sizes.depth, sizes.heads - 1
        if not self.gates and not method.tokens:
            raise InputError(
                "DynamicWidth(tokens=False) has nothing to choose in a model with a single attention head; use "
                "tokens=True."
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

    def _by_level(self, width: int | None) -> nn.Linear:
        gates = nn.Linear(width or self.FREQUENCIES, self.depth * self.gates)
        nn.init.zeros_(gates.weight)
        nn.init.constant_(gates.bias, self.OPEN)
        return gates

    def forward(self, level: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, depth, H - 1) of heads and of channel groups, without the first of each, at levels (B,)."""
        frequencies = timestep_frequencies(1000.0 * level, self.FREQUENCIES)
        if self.embedding is not None:
            with torch.autocast(frequencies.device.type, enabled=False):
                first: nn.Linear = self.embedding[0]  # type: ignore[assignment]
                frequencies = self.embedding(_fit(frequencies, first.weight))
        return self._logits(self.heads, frequencies), self._logits(self.channels, frequencies)

    @property
    def level_flops(self) -> int:
        """Of the decisions about heads and channels at one noise level; a multiply-add is 2."""
        layers = [each for each in (self.heads, self.channels) if each is not None]
        layers += [] if self.embedding is None else [each for each in self.embedding if isinstance(each, nn.Linear)]
        return sum(2 * each.in_features * each.out_features for each in layers)

    def _logits(self, gates: nn.Linear | None, frequencies: Tensor) -> Tensor | None:
        if gates is None:
            return None
        with torch.autocast(frequencies.device.type, enabled=False):
            logits: Tensor = gates(_fit(frequencies, gates.weight))
        return logits.view(-1, self.depth, self.gates).to(frequencies.device)

    def token_logits(self, block: int, x: Tensor) -> Tensor:
        """Logits (B, N) of the tokens (B, N, D) that the MLP of a block gets."""
        assert self.tokens is not None
        first = self.tokens[block][0]  # type: ignore[index]
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.tokens[block](_fit(x, first.weight))
        return logits.squeeze(-1).to(x.device)

    @property
    def token_flops(self) -> int:
        """Of the network that decides about a token; a multiply-add is 2."""
        first = self.tokens[0][0] if self.tokens is not None else None  # type: ignore[index]
        return 0 if first is None else 2 * first.out_features * (first.in_features + 1)

    def target(self, method: DynamicWidth) -> Tensor | float:
        """What the share of the FLOPs is held at now."""
        if not method.warmup:
            return method.target
        return 1.0 - (1.0 - method.target) * (self.calls / method.warmup).clamp(max=1.0)


def _fit(x: Tensor, weight: Tensor) -> Tensor:
    """In the type of a weight and where it is, unless hooks bring it to its inputs."""
    return x.to(weight.dtype) if weight.is_meta else x.to(weight)


def _embedding(inputs: int, width: int) -> nn.Sequential:
    """As a model embeds its timestep."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _token_gate(width: int, hidden: int, bias: float) -> nn.Sequential:
    """Open for any token: the last layer starts at its bias alone."""
    last = nn.Linear(hidden, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)
