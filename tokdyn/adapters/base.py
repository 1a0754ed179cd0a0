"""Declare a family of models: where its blocks are, what goes into them, and what comes out.

An adapter names attributes and arguments of a model's classes without importing them. Everything that attaches methods
to a model, or counts what a call costs, reads the model through its adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from tokdyn.adapters.arrangement import Arrangement
from tokdyn.adapters.products import DEFAULT_PRODUCTS
from tokdyn.adapters.products import Products as Products
from tokdyn.adapters.width import Width
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens

Arguments = Mapping[str, Any]
"""The arguments of one call of a model or of a block, by name."""


@dataclass(frozen=True)
class Follow:
    """An argument of a block with one entry per token, such as a rotary table or a mask.

    When tokens are selected, the same entries of this argument are selected. A whole number that equals the number of
    image tokens, such as a length, becomes the number of those selected. None, and tensors whose token axis is
    shorter than the number of image tokens, are passed on unchanged. In a tuple or list, entries of every tensor are
    selected unless `item` names one.

    Attributes:
        name: the name of the argument.
        axis: the token axis of the tensor.
        batched: whether axis 0 is the batch. An unbatched tensor gains a batch axis once samples keep different tokens.
        dims: select only from tensors with this many axes; None selects from all.
        item: select only from the tensor at this index of a tuple or list; None selects from all.
        joint: where the entries of image tokens lie in this argument, if not where `Blocks.joint` says.
    """

    name: str
    axis: int = 1
    batched: bool = True
    dims: int | None = None
    item: int | None = None
    joint: Literal["first", "last"] | None = None


@dataclass(frozen=True)
class Blocks:
    """A list of transformer blocks that run one after the other on the same tokens.

    Attributes:
        path: attribute of the model that holds the list; dots lead into submodules.
        tokens: argument of a block that holds the image tokens, (B, N, D).
        sequence_first: arguments whose first two axes are tokens and batch, in this order, instead of batch and tokens;
            if `tokens` is one of them, the block returns its tokens like this, too.
        arrangement: how arguments are arranged that lack a batch axis, or have other samples on it; None if none does.
        text: argument of a block that holds text tokens in a stream of their own, (B, L, D); None if there is none.
        streams: arguments that hold tokens of further streams, such as audio, which blocks change and return and which
            the model uses after its last block. A cache restores each by its own effect; the effect on `text` is not
            restored, because it is not used after the last block.
        returns: what a block returns, in order: "tokens" for image tokens, "text" for text tokens, or the name of one
            of `streams`; () if this is to be learned in the first call.
        image: where image tokens lie in `tokens`: "all" of it, or "first" or "last" beside text tokens.
        inside: where image tokens lie in the input of attention, if text joins them within the block.
        inside_mlp: where image tokens lie in the input of the MLP, likewise.
        joint: where image tokens lie in tensors that span text and image, such as rotary tables and masks.
        follow: arguments with one entry per token.
        shared: further arguments without a batch axis, such as tables for the tokens of other streams.
        alone: whether samples that keep different tokens must be computed one after the other, because an argument in
            `follow` cannot hold the entries of several samples.
        keeps_text: whether the model uses text tokens that lie in the sequence of the image tokens, or what else does,
            after its last block, so that a cache restores them as well.
        full_between: whether the model itself computes with the tokens between blocks, such as adding control
            residuals, and needs all of them there. Tokens that are left out then wait in the full grid.
        rounds: arguments that hold embeddings of timesteps, where a sample may have several: in several arguments, or
            in one that has one entry of every sample and then another of every sample. A last round with fewer entries
            belongs to all samples.
        attention: attributes of a block that may hold self-attention over the image tokens; dots lead into submodules,
            and the first that the block has is used. Its first argument holds them, or the one named like `tokens`.
        mlp: attributes that may hold the MLP, likewise.
        stream: attribute of a block that holds an identity module through which tokens pass between attention and the
            norm before the MLP; None if there is none.
        packing: argument of a block that takes the `Packing` of packed tokens (T, D); None if tokens are (B, N, D).
        modulated: `modulated(block, arguments)` computes the modulated input (B, N, D) of the block's attention, which
            FeatureCache compares from step to step; None compares the tokens that the block gets.
        time: argument of a block that holds the embedding of the timestep, (B, ...), if no module returns the one that
            coefficients were published for; None takes what the module returns that embeds it, see `ModelAdapter.time`.
        time_projection: argument of a block that holds the projection of that embedding to the modulation of all
            blocks, (B, ...); None if there is none.
        products: what the layers of a block run over; None if unknown, and then FLOPs are counted but not computed.
        width: the layers that can be sliced to some heads and MLP channels; None if there are none.
    """

    path: str
    tokens: str = "hidden_states"
    sequence_first: tuple[str, ...] = ()
    arrangement: Arrangement | None = None
    text: str | None = None
    streams: tuple[str, ...] = ()
    returns: tuple[str, ...] = ("tokens",)
    image: Literal["all", "first", "last"] = "all"
    inside: Literal["first", "last"] | None = None
    inside_mlp: Literal["first", "last"] | None = None
    joint: Literal["first", "last"] = "last"
    follow: tuple[Follow, ...] = ()
    shared: tuple[str, ...] = ()
    alone: bool = False
    keeps_text: bool = False
    full_between: bool = False
    rounds: tuple[str, ...] = ()
    attention: tuple[str, ...] = ("attn1", "attn")
    mlp: tuple[str, ...] = ("ff", "mlp")
    stream: str | None = None
    packing: str | None = None
    modulated: Callable[[nn.Module, Arguments], Tensor] | None = None
    time: str | None = None
    time_projection: str | None = None
    products: Products | None = DEFAULT_PRODUCTS
    width: Width | None = None

    @property
    def rearranged(self) -> bool:
        """Whether a block takes arguments in which samples are not on the first axis and tokens on the second."""
        return bool(self.sequence_first) or self.arrangement is not None

    @property
    def text_sees_less(self) -> bool:
        """Whether text tokens may cost other FLOPs than image tokens in the same sequence."""
        products = self.products
        return products is not None and (
            products.text_sees != "all" or (bool(products.cross) and products.cross_joint is not True)
        )

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """Arguments of a block whose rows FLOPs depend on, beside those of tokens, text and encoder."""
        text = (self.text,) if self.text is not None and self.image != "all" else ()
        return (*text, *(() if self.products is None else self.products.arguments))

    def __post_init__(self) -> None:
        _ = self.counted  # at its first use, cached_property of Python 3.11 locks, which torch.compile cannot trace
        if self.returns and "tokens" not in self.returns:
            raise InputError(
                f"the blocks in {self.path!r} are declared with returns={self.returns}, which lacks 'tokens'; name "
                "everything that a block returns, in order."
            )
        unknown = set(self.returns) - {"tokens", "text", *self.streams}
        if unknown:
            raise InputError(
                f"the blocks in {self.path!r} are declared with returns={self.returns}, in which {min(unknown)!r} is "
                "neither 'tokens' nor 'text' nor one of streams."
            )
        if "text" in self.returns and self.text is None:
            raise InputError(
                f"the blocks in {self.path!r} are declared with returns={self.returns} but without text; give text= "
                "the name of the argument that holds it."
            )


def configured_width(model: nn.Module) -> int:
    """Return D of a diffusers model, number of heads times head size; 0 if its configuration does not give both."""
    return configured_heads(model) * _configured(model, "attention_head_dim")


def configured_heads(model: nn.Module) -> int:
    """Return H of a diffusers model; 0 if its configuration does not give it."""
    return _configured(model, "num_attention_heads")


def _skip_layers(model: nn.Module, arguments: Arguments) -> Collection[int]:
    """Return the blocks that skip-layer guidance of diffusers leaves out of a call."""
    return arguments.get("skip_layers") or ()


def _configured(model: nn.Module, name: str) -> int:
    config: Any = getattr(model, "config", None)
    return int(config.get(name) or 0) if isinstance(config, Mapping) else 0


@dataclass(frozen=True)
class ModelAdapter:
    """The declaration of a family of models.

    Attributes:
        name: of the family.
        classes: names of the model classes; subclasses match too.
        blocks: the lists of blocks, in the order in which they run.
        grid: `grid(model, arguments)` computes the token grid of a call, or `ImageTokens` where a call may have
            reference images; None if unknown, and then no method may drop or merge tokens.
        level: `level(model, arguments)` computes the noise level of a call, (B,) or (), where 1 is pure noise; None for
            models that have none, such as classifiers.
        refuse: arguments of the model that cannot be combined with token reduction, each with the reason.
        refuse_always: arguments that cannot be combined with any method, likewise.
        width: `width(model)` computes D, the channels of an image token between blocks; 0 if unknown.
        heads: `heads(model)` computes H, the attention heads of a block; 0 if unknown.
        guidance: how pipelines call the model for classifier-free guidance: with both branches in one batch, the
            conditional half first ("cond_first") or the unconditional one ("uncond_first"); or in two calls ("calls"),
            the conditional one first.
        chunked: whether the model chunks its tokens itself, so that its blocks get a subset that depends on the image.
        dense: whether blocks mix neighbouring cells, by a convolution for example, so that no token can be left out.
        softmax: whether attention is softmax attention over all samples at once, and over image tokens and at most one
            other kind of tokens, so that its keys can be weighted.
        varying: arguments beside the input and the noise level that change from step to step, such as latents of the
            sound or a second timestep, and so do not tell one prompt from another.
        behind: `behind(arguments)` counts the tokens of a call, such as those of reference images, that follow the
            image tokens in the sequences of blocks with `Blocks.image="last"`; None if there are never any. Methods see
            them before the image tokens. It may look at shapes only.
        told: `told(arguments)` returns, with a batch axis, the input of a call and what it is conditioned on, where
            arguments lack that axis; None takes all arguments but those in `varying`.
        plain: `plain(arguments)` tells whether a call is made without methods, because it only prepares others.
        left_out: `left_out(model, arguments)` returns the blocks that the model itself leaves out of a call.
        read_ahead: arguments whose values, not only their shapes, determine the grid or which tokens are references.
        complete: why no token may be left out of a block, nor merged around a sublayer that the blocks do not declare;
            None if tokens may.
        whole: `whole(model)` returns why a model with this configuration needs all its tokens, or None if it does not.
        fits: `fits(model)` returns whether a model with such a class name belongs to the family; None accepts all.
        time: path of the module that embeds the timestep, before the blocks; None finds it by its class or its name.
        entries: methods of the model that run its blocks and may be called instead of the model itself.
        clock: whether the direction of `level` is "known", or "assumed" and held against the first calls in sampling.
        inferred: whether the adapter was inferred from the model's structure and has to be checked in the first call.
    """

    name: str
    classes: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    grid: Callable[[nn.Module, Arguments], Grid | ImageTokens] | None
    level: Callable[[nn.Module, Arguments], Tensor | float] | None
    refuse: Mapping[str, str] = field(default_factory=dict)
    refuse_always: Mapping[str, str] = field(default_factory=dict)
    width: Callable[[nn.Module], int] = configured_width
    heads: Callable[[nn.Module], int] = configured_heads
    guidance: Literal["cond_first", "uncond_first", "calls"] = "uncond_first"
    chunked: bool = False
    dense: bool = False
    softmax: bool = True
    varying: tuple[str, ...] = ()
    behind: Callable[[Arguments], int] | None = None
    told: Callable[[Arguments], Arguments] | None = None
    plain: Callable[[Arguments], bool] | None = None
    left_out: Callable[[nn.Module, Arguments], Collection[int]] = _skip_layers
    read_ahead: tuple[str, ...] = ()
    complete: str | None = None
    whole: Callable[[nn.Module], str | None] | None = None
    fits: Callable[[nn.Module], bool] | None = None
    time: str | None = None
    entries: tuple[str, ...] = ()
    clock: Literal["known", "assumed"] = "known"
    inferred: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("classes", str), ("blocks", Blocks)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not value or not all(isinstance(item, kind) for item in value):
                raise InputError(f"the adapter {self.name!r} has {name}={value!r}; give a tuple of {kind.__name__}.")

    def image_tokens(self, model: nn.Module, call: Arguments) -> ImageTokens:
        """Read the grid of a call, and those of its reference images."""
        assert self.grid is not None, "methods that need a grid were refused"
        tokens = self.grid(model, call)
        tokens = tokens if isinstance(tokens, ImageTokens) else ImageTokens(tokens)
        behind = 0 if self.behind is None else self.behind(call)
        return tokens._replace(rotation=(-behind,)) if behind else tokens

    def telling(self, arguments: Arguments) -> Arguments:
        """Return the arguments of a call by which it is told from others: all but those in `varying`, see `told`."""
        if self.told is not None:
            return self.told(arguments)
        if not self.varying:
            return arguments
        return {name: value for name, value in arguments.items() if name not in self.varying}

    @property
    def halves(self) -> tuple[str, str]:
        """The guidance branches of the first and the second half of a batch."""
        return ("cond", "uncond") if self.guidance == "cond_first" else ("uncond", "cond")
