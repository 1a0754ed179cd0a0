"""What an adapter says about the matrix products of a block: which rows its layers run over, and what attends to what.

Rows are the vectors that a layer is applied to. `tokdyn.adapters.structure` reads the layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Patterns = tuple[str, ...]
"""Names of layers as `named_modules` of a block gives them; `*` matches any characters."""


@dataclass(frozen=True)
class CrossAttention:
    """An attention between two sequences, such as those of video and sound, or within one beside the image tokens.

    A sequence is "image" for the image tokens, "joint" for image and text tokens, "text", or an argument of the block,
    as in `Products.over`. Layers whose names begin with `to_k` or `to_v`, also `to_key` and `to_value`, run over keys,
    and all others over queries. If its path is in `Products.cross`, it is a second attention there, whose layers follow
    the rules of the first one unless `Products.over` names them.

    Attributes:
        path: attribute of the block that holds the attention; dots lead into submodules.
        queries: the sequence that attends.
        keys: the sequence that is attended to.
        without: argument of the block with the number of tokens at the beginning of the keys that are left out.
    """

    path: str
    queries: str
    keys: str
    without: str | None = None


@dataclass(frozen=True)
class Experts:
    """Experts of which each token uses a few; their layers are not counted by themselves.

    Attributes:
        path: attribute of the block that holds the experts; dots lead into submodules.
        flops: FLOPs of one expert for one token.
        share: how many experts a token uses, as a mean over the tokens.
        count: number of experts that choose among the tokens of a sample, each of them the same number, rounded up; 0
            if tokens choose among experts.
        router: FLOPs for one token of products with weights that are no layers.
    """

    path: str
    flops: int
    share: float
    count: int = 0
    router: int = 0


@dataclass(frozen=True)
class Products:
    """Which layers of a block run over other rows than its image tokens. FLOPs are computed from this.

    Rows are the vectors that a layer is applied to. Give only what does not follow from the rest of the declaration: if
    `image`, `inside` or `inside_mlp` of `Blocks` says that text and image are one sequence, the layers there run over
    both; so do the layers of attention if a block takes text as an argument of its own and attention has no separate
    layers for text.

    Attributes:
        sample: layers that run once per sample, such as adaLN.
        rounds: those of them that run once for each entry per sample that the arguments in `Blocks.rounds` hold.
        text: layers that run over the text tokens of a separate stream.
        joint: further layers that run over image and text tokens in one sequence, or over one after the other; a
            function of the block if blocks differ.
        mlp: layers that belong to the MLP but lie outside the attributes in `Blocks.mlp`.
        cross: attributes of a block that hold cross-attention from image tokens to an encoder's tokens.
        cross_joint: whether text tokens in the sequence of the image tokens go through this cross-attention, too; a
            function of the block if blocks differ.
        context: argument of a block that holds the encoder's tokens.
        context_text: how many of the encoder's tokens are text, at the end, where image embeddings with their own key
            and value layers precede them; None if all are.
        beside: attributes that hold a second attention over image tokens only, beside the one in `Blocks.attention`.
        between: attentions between other sequences, such as video and sound.
        over: layers that run over the rows of another argument of the block, by its name, such as embeddings of
            timesteps that may have an entry per token; "image" and "joint" overrule other rules. "name.1" is an item of
            a tuple. A number stands for as many rows of every sample.
        needs: layers, and paths of attentions, that run only where an argument of the block is given, and not False;
            with "not " before its name, only where it is not.
        experts: returns the experts of a block.
        linear: whether attention multiplies keys with values first, so that its cost is linear in the tokens: "padded"
            adds a row of ones to the values for the normaliser, "summed" multiplies the sum of the keys for it.
        channels: returns the channels of the queries of an attention, counted twice if it computes two maps; None reads
            them from its layers.
        text_sees: what text tokens attend to: "all" tokens, "text" only, or "none" if they are only keys and values.
        pair_mask: argument from which attention multiplies a mask of all pairs of tokens, if it is given.
        twice: layers that run twice over their rows, such as modulation by the timesteps of noisy and of clean tokens.
        indicator: layers that `Blocks.modulated` runs.
    """

    sample: Patterns = ("norm*", "*modulation*", "*_mod.*")
    rounds: Patterns = ()
    text: Patterns = ("*.add_*", "*.to_add_out*", "*.to_added_*", "*_context.*", "txt_*")
    joint: Patterns | Callable[[Any], Patterns] = ()
    mlp: Patterns = ("ff*", "*mlp*", "proj_out*")
    cross: tuple[str, ...] = ()
    cross_joint: bool | Callable[[Any], bool] = False
    context: str = "encoder_hidden_states"
    context_text: int | None = None
    beside: tuple[str, ...] = ()
    between: tuple[CrossAttention, ...] = ()
    over: Mapping[str, Patterns] = field(default_factory=dict)
    needs: Mapping[str, Patterns] = field(default_factory=dict)
    experts: Callable[[Any], tuple[Experts, ...]] | None = None
    linear: Literal["padded", "summed"] | None = None
    channels: Callable[[Any], int] | None = None
    text_sees: Literal["all", "text", "none"] = "all"
    pair_mask: str | None = None
    twice: Patterns = ()
    indicator: Patterns = ("norm1.*", "adaLN_modulation.*", "img_mod.*")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments of a block whose rows are counted in every call."""
        between = (name for each in self.between for name in (each.queries, each.keys, each.without))
        names = [*self.over, *between, *(name.removeprefix("not ") for name in self.needs), self.pair_mask]
        return tuple(dict.fromkeys(name for name in names if name not in (None, "image", "joint", "text")))

    def is_joint(self, block: nn.Module) -> Patterns:
        """Return `joint` for a block."""
        return self.joint(block) if callable(self.joint) else self.joint

    def crosses_joint(self, block: nn.Module) -> bool:
        """Return `cross_joint` for a block."""
        return self.cross_joint(block) if callable(self.cross_joint) else self.cross_joint


DEFAULT_PRODUCTS = Products()
