"""Declare which layers of a block can be sliced to some attention heads or MLP channels; DynamicWidth needs this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["heads", "channels"]
"""What the outputs or inputs of a layer belong to: attention heads, or channels of the MLP."""


@dataclass(frozen=True)
class SlicedLayer:
    """A linear layer whose outputs or inputs belong to attention heads or to MLP channels.

    Attributes:
        path: path of the layer from the block. Blocks may lack the layer.
        out: what its outputs belong to, in order: each "heads" stands for the channels of all heads, each "channels"
            for those of the MLP. A single kind is repeated to fill the layer, as in one that computes queries, keys and
            values together. A layer with fewer outputs than all heads have channels computes keys or values that
            several heads share.
        into: what its inputs belong to, likewise. If both kinds occur in `out` or in `into`, heads come first.
        norm: path of a norm that its outputs go through. If that norm spans all heads, the layer is computed in full
            and the output of the norm is sliced.
    """

    path: str
    out: tuple[Kind, ...] = ()
    into: tuple[Kind, ...] = ()
    norm: str | None = None


@dataclass(frozen=True)
class Width:
    """Everything in a block that depends on the number of attention heads and of MLP channels.

    Attributes:
        layers: the layers to slice.
        inner: dotted attributes of the block that lead to H d, the channels of all heads together.
        hidden: dotted attributes that lead to the number of MLP channels; None if the MLP cannot be sliced. If they
            lead to the number of inputs of a layer that takes heads too, the H d inputs of the heads are subtracted.
        attention: paths of the modules that store the number of heads.
        counts: attributes of these modules that hold a number of heads; a module may lack some.
        inners: attributes of these modules that hold the channels of all heads together, likewise.
        hiddens: attributes of these modules, or of the block, that hold the number of MLP channels, likewise.
        tables: arguments of the block whose last axis spans the channels of all heads.
        per_head: parameters of the block with one entry per head.
        sliceable: `sliceable(block)` tells whether the code of this block really uses these attributes. If not,
            everything is computed, and the results of heads and channels that are off are multiplied by 0. None takes
            it for granted.
    """

    layers: tuple[SlicedLayer, ...]
    inner: str
    hidden: str | None
    attention: tuple[str, ...]
    counts: tuple[str, ...] = ("heads",)
    inners: tuple[str, ...] = ("inner_dim", "inner_kv_dim")
    hiddens: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    sliceable: Callable[[nn.Module], bool] | None = None

    @property
    def parallel(self) -> bool:
        """Whether one layer takes both the heads and the MLP channels as inputs."""
        return any(len(set(layer.into)) > 1 for layer in self.layers)


def attention_layers(attention: str, out: bool = True) -> tuple[SlicedLayer, ...]:
    """List the layers of a diffusers attention, including the separate layers for text tokens that some have.

    Args:
        attention: attribute of the block that holds the attention.
        out: whether the attention has an output projection of its own.
    """
    heads: tuple[Kind, ...] = ("heads",)
    layers = [
        SlicedLayer(f"{attention}.to_q", out=heads, norm=f"{attention}.norm_q"),
        SlicedLayer(f"{attention}.to_k", out=heads, norm=f"{attention}.norm_k"),
        SlicedLayer(f"{attention}.to_v", out=heads),
        SlicedLayer(f"{attention}.add_q_proj", out=heads, norm=f"{attention}.norm_added_q"),
        SlicedLayer(f"{attention}.add_k_proj", out=heads, norm=f"{attention}.norm_added_k"),
        SlicedLayer(f"{attention}.add_v_proj", out=heads),
        SlicedLayer(f"{attention}.to_add_out", into=heads),
    ]
    return (*layers, SlicedLayer(f"{attention}.to_out.0", into=heads)) if out else tuple(layers)


def mlp_layers(out: str, *inputs: str) -> tuple[SlicedLayer, ...]:
    """List the layers of an MLP by their paths: the output layer, and the layers that compute its channels."""
    channels: tuple[Kind, ...] = ("channels",)
    return (*(SlicedLayer(path, out=channels) for path in inputs), SlicedLayer(out, into=channels))


def _at(block: nn.Module, path: str) -> Any:
    """Return what is at dotted attributes of a block; None if there is nothing."""
    module: Any = block
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def runs_processor(attention: str | tuple[str, ...], *processors: str) -> Callable[[nn.Module], bool]:
    """Return a function that tells whether a block's attention runs one of these processors, with unfused q, k and v.

    Args:
        attention: attribute of the block, or attributes of which it may lack some.
        *processors: names of classes of diffusers' attention processors.
    """
    attributes = (attention,) if isinstance(attention, str) else attention

    def test(block: nn.Module) -> bool:
        modules = [module for name in attributes if (module := _at(block, name)) is not None]
        unfused = not any(
            getattr(module, "fused_projections", False) or hasattr(module, "to_qkv") for module in modules
        )
        return unfused and all(type(getattr(module, "processor", None)).__name__ in processors for module in modules)

    return test


def attention_and_mlp(attention: str, feed_forward: str, *processors: str, tables: tuple[str, ...] = ()) -> Width:
    """Declare a diffusers block that runs attention and then an MLP of the class FeedForward.

    Args:
        attention: attribute of the block that holds the attention.
        feed_forward: attribute of the block that holds the MLP.
        *processors: names of the attention processors that can be sliced.
        tables: see `Width`.
    """
    return Width(
        layers=(*attention_layers(attention), *mlp_layers(f"{feed_forward}.net.2", f"{feed_forward}.net.0.proj")),
        inner=f"{attention}.to_out.0.in_features",
        hidden=f"{feed_forward}.net.2.in_features",
        attention=(attention,),
        tables=tables,
        sliceable=runs_processor(attention, *processors),
    )


def attention_beside_mlp(attention: str, *processors: str, hiddens: tuple[str, ...] = ()) -> Width:
    """Declare a diffusers block that runs attention and MLP in parallel: `proj_out` takes the outputs of both.

    Args:
        attention: attribute of the block that holds the attention.
        *processors: names of the attention processors that can be sliced.
        hiddens: see `Width`.
    """
    return Width(
        layers=(
            *attention_layers(attention, out=False),
            SlicedLayer("proj_mlp", out=("channels",)),
            SlicedLayer("proj_out", into=("heads", "channels")),
        ),
        inner=f"{attention}.to_q.out_features",
        hidden="proj_out.in_features",
        attention=(attention,),
        hiddens=hiddens,
        sliceable=runs_processor(attention, *processors),
    )
