"""Declare which layers of a block can be sliced to some of its attention heads or MLP channels, for DynamicWidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["heads", "channels"]
"""What the outputs or inputs of a layer belong to: attention heads, or channels of the MLP."""


@dataclass(frozen=True)
class SlicedLayer:
    """A linear layer whose outputs or inputs belong to attention heads or to MLP channels.

    Attributes:
        path: of the layer, from the block; a block without such a layer is fine.
        out: what its outputs belong to, in order. A single kind is repeated to fill the layer, as in one that computes
            queries, keys and values together. A layer with fewer outputs than the heads have channels computes keys or
            values that several heads share.
        into: what its inputs belong to, in order. Where both kinds occur, in `out` or `into`, heads come first.
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
        sliceable: tells whether this block really computes with these attributes. Where it does not, everything is
            computed and the results of some heads and channels are set to zero. None takes it for granted.
    """

    layers: tuple[SlicedLayer, ...]
    inner: str
    hidden: str | None
    attention: tuple[str, ...]
    counts: tuple[str, ...] = ("heads",)
    inners: tuple[str, ...] = ("inner_dim", "inner_kv_dim")
    hiddens: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    sliceable: Callable[[nn.Module], bool] | None = None

    @property
    def parallel(self) -> bool:
        """Whether one layer takes both the heads and the MLP channels as inputs."""
        return any(len(set(layer.into)) > 1 for layer in self.layers)


def attention_layers(attention: str, out: bool = True) -> tuple[SlicedLayer, ...]:
    """List the layers of an attention of diffusers, including those of text that joins it.

    Args:
        attention: attribute of the block.
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
    """List the layers of an MLP: the output layer `out`, and the `inputs` layers that compute its channels."""
    channels: tuple[Kind, ...] = ("channels",)
    return (*(SlicedLayer(path, out=channels) for path in inputs), SlicedLayer(out, into=channels))


def runs_processor(attention: str | tuple[str, ...], *processors: str) -> Callable[[nn.Module], bool]:
    """Return a test of a block: its attention runs one of these diffusers processors, with q, k and v unfused.

    Args:
        attention: attributes of the block; of several, it may lack some.
        *processors: names of the processor classes.
    """
    attributes = (attention,) if isinstance(attention, str) else attention

    def test(block: nn.Module) -> bool:
        modules = [module for name in attributes if (module := getattr(block, name, None)) is not None]
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
