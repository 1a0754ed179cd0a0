"""What an adapter says of a family of models: where its blocks are, and what goes in and out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from tokdyn.adapters.width import Width
from tokdyn.errors import InputError
from tokdyn.tokens import Grid

Arguments = Mapping[str, Any]
"""The arguments of one call of the model, by name."""


@dataclass(frozen=True)
class Follow:
    """An argument of a block with one entry for each token, which must stay with its token.

    Attributes:
        name: of the argument; None and tensors that hold one entry for all tokens are left as they are.
        axis: of the tokens. A tuple or list of tensors is followed in each of them.
        batched: axis 0 is the batch. A tensor without a batch becomes one with it once samples keep different tokens.
        dims: only a tensor of so many axes has an entry for each token.
        item: only this one of a tuple of tensors has; None is all of them.
    """

    name: str
    axis: int = 1
    batched: bool = True
    dims: int | None = None
    item: int | None = None


Patterns = tuple[str, ...]
"""Names of layers as `named_modules` of a block gives them, with * for any characters."""


@dataclass(frozen=True)
class Products:
    """Which linear layers and convolutions of a block run over something else than its image tokens.

    What is clear already is not said again: where `image`, `inside` or `inside_mlp` of the `Stack` put text into one
    sequence with the image tokens, the layers there run over both, and so do those of attention if a block gets text
    apart but attention has no layers for it.

    Attributes:
        sample: layers with one row for each sample, such as adaLN.
        text: layers over the text tokens of a stream of their own.
        joint: more layers over image and text tokens in one sequence.
        mlp: layers outside of the attributes in `Stack.mlp` that belong to the MLP.
        cross: attributes of a block that hold attention of the image tokens to those of an encoder.
        context: argument of a block that holds the encoder's tokens.
        words: how many of them are text where those of a picture come first, which have keys and values of their own.
        beside: attributes that hold attention over the image tokens alone, beside that in `Stack.attention`.
        linear: attention in `Stack.attention` multiplies keys with values first, so that its cost is linear in tokens.
        indicator: layers that `Stack.modulated` runs.
    """

    sample: Patterns = ("norm*", "*modulation*", "*_mod.*")
    text: Patterns = ("*.add_*", "*.to_add_out*", "*.to_added_*", "*_context.*", "txt_*")
    joint: Patterns = ()
    mlp: Patterns = ("ff*", "*mlp*", "proj_out*")
    cross: tuple[str, ...] = ()
    context: str = "encoder_hidden_states"
    words: int | None = None
    beside: tuple[str, ...] = ()
    linear: bool = False
    indicator: Patterns = ("norm1.*", "adaLN_modulation.*", "img_mod.*")


USUAL = Products()


@dataclass(frozen=True)
class Stack:
    """A list of blocks that are called one after the other on the same tokens.

    Attributes:
        path: attribute of the model that holds the list; dots lead into parts of the model.
        tokens: argument of a block that holds the image tokens.
        text: argument of a block that holds text tokens, if it has one of its own.
        returns: what a block returns, in order; () is learned when the first block runs.
        image: where image tokens lie in `tokens`, beside text in the same tensor.
        inside: where image tokens lie in what attention gets, if text joins them within the block.
        inside_mlp: the same for the MLP.
        joint: where image tokens lie in what spans both, such as rotary tables and masks.
        follow: what must stay with its token.
        attention: attribute of a block that holds self-attention over the image tokens, in order of preference.
        mlp: the same for the MLP.
        stream: attribute of a block, an identity that the tokens pass between attention and the norm ahead of the MLP.
        packing: argument of a block that says which rows of packed tokens (T, D) belong to which sample; None if tokens
            are (B, N, D).
        modulated: (B, ...) what attention of a block gets, from the block and its arguments by name; the indicator of
            feature caches. None takes the tokens that the block gets.
        products: what the cost of a block follows from. None: not known, so that FLOPs are counted and not computed.
        width: layers that can be computed for some heads and MLP channels alone; None if there are none.
    """

    path: str
    tokens: str = "hidden_states"
    text: str | None = None
    returns: tuple[Literal["tokens", "text"], ...] = ("tokens",)
    image: Literal["all", "first", "last"] = "all"
    inside: Literal["first", "last"] | None = None
    inside_mlp: Literal["first", "last"] | None = None
    joint: Literal["first", "last"] = "last"
    follow: tuple[Follow, ...] = ()
    attention: tuple[str, ...] = ("attn1", "attn")
    mlp: tuple[str, ...] = ("ff", "mlp")
    stream: str | None = None
    packing: str | None = None
    modulated: Callable[[nn.Module, Arguments], Tensor] | None = None
    products: Products | None = USUAL
    width: Width | None = None

    def __post_init__(self) -> None:
        if self.returns and "tokens" not in self.returns:
            raise InputError(f"the blocks in {self.path!r} return {self.returns}; 'tokens' has to be among it.")
        if "text" in self.returns and self.text is None:
            raise InputError(
                f"the blocks in {self.path!r} return text, but take none; give text= the name of the argument."
            )


def configured_width(model: nn.Module) -> int:
    """D of a model of diffusers: heads times their size; 0 if its configuration does not say."""
    return configured_heads(model) * _configured(model, "attention_head_dim")


def configured_heads(model: nn.Module) -> int:
    """H of a model of diffusers; 0 if its configuration does not say."""
    return _configured(model, "num_attention_heads")


def _configured(model: nn.Module, name: str) -> int:
    config: Any = getattr(model, "config", None)
    return int(config.get(name) or 0) if isinstance(config, Mapping) else 0


@dataclass(frozen=True)
class ModelAdapter:
    """A family of models.

    Attributes:
        name: of the family.
        classes: names of the classes it is for; subclasses count.
        stacks: in the order in which they run.
        grid: the token grid of a call; None: not known, so that no method can leave out or merge tokens.
        level: (B,) or () noise level of a call, 1 is pure noise; None: there is none, as in a classifier.
        refuse: arguments of the model that cannot be used together with fewer tokens, and why.
        width: D, channels of an image token between blocks; 0 is not known.
        heads: H, attention heads of a block; 0 is not known.
        guidance: how pipelines ask for the two branches of guidance: as halves of one batch, the conditional or the
            unconditional one first, or in two calls, the conditional one first.
        chunked: the model chunks its tokens itself, so that its blocks see a subset that changes with the image.
        dense: blocks look at neighbouring cells, so that tokens cannot be left out of them.
        softmax: attention is softmax attention, so that its keys can be weighted.
        read_ahead: arguments whose values, not only their shapes, the grid depends on.
        whole: why tokens cannot be left out or merged in a model that was built as this one; None: they can.
        fits: whether a model of such a class name really is one; None takes the name's word.
        entries: methods of the model that run its blocks and may be called in place of the model itself.
        inferred: read off the model's structure; the first call checks it against what the model does.
    """

    name: str
    classes: tuple[str, ...]
    stacks: tuple[Stack, ...]
    grid: Callable[[nn.Module, Arguments], Grid] | None
    level: Callable[[nn.Module, Arguments], Tensor | float] | None
    refuse: Mapping[str, str] = field(default_factory=dict)
    width: Callable[[nn.Module], int] = configured_width
    heads: Callable[[nn.Module], int] = configured_heads
    guidance: Literal["cond_first", "uncond_first", "calls"] = "uncond_first"
    chunked: bool = False
    dense: bool = False
    softmax: bool = True
    read_ahead: tuple[str, ...] = ()
    whole: Callable[[nn.Module], str | None] | None = None
    fits: Callable[[nn.Module], bool] | None = None
    entries: tuple[str, ...] = ()
    inferred: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("classes", str), ("stacks", Stack)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or not all(isinstance(each, kind) for each in value):
                raise InputError(f"{name} of the adapter {self.name!r} is {value!r}; give a tuple of {kind.__name__}.")

    @property
    def halves(self) -> tuple[str, str]:
        """The branches of guidance in the halves of one batch."""
        return ("cond", "uncond") if self.guidance == "cond_first" else ("uncond", "cond")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An adapter of tokdyn is copied and pickled by its name, since functions in it have none."""
        from tokdyn.adapters import ADAPTERS

        return (_own, (self.name,)) if any(each is self for each in ADAPTERS) else super().__reduce_ex__(protocol)


def _own(name: str) -> ModelAdapter:
    """The adapter of that name."""
    from tokdyn.adapters import ADAPTERS

    return next(each for each in ADAPTERS if each.name == name)
