"""Which layers of a block can be computed for some attention heads, or some channels of the MLP, alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["heads", "channels"]


@dataclass(frozen=True)
class Cut:
    """A linear layer whose outputs or inputs belong to attention heads or to channels of the MLP.

    Attributes:
        path: of the layer, from the block; a block without it does without.
        out: what its outputs belong to, in order. A single kind is repeated as often as there is room, as in a layer
            for queries, keys and values together; fewer outputs than the heads have are keys or values that several
            heads share.
        into: what its inputs belong to, in order; heads come before channels in both.
        norm: path of a norm that its outputs go through. A norm over all heads needs them all, so the layer is left
            whole and what comes out of the norm is selected.
    """

    path: str
    out: tuple[Kind, ...] = ()
    into: tuple[Kind, ...] = ()
    norm: str | None = None


@dataclass(frozen=True)
class Width:
    """What depends on the number of heads and of MLP channels in a block.

    Attributes:
        cuts: the layers.
        inner: attributes that lead from the block to the channels of all heads together.
        hidden: the same for the channels of the MLP; None if they cannot be cut. Inputs of a layer that the heads lead
            into as well are those of both.
        attention: paths of the modules whose attributes say how many heads there are.
        counts: attributes of these that hold a number of heads; those that a module lacks are passed over.
        inners: the same for the channels of all heads together.
        hiddens: the same for the channels of the MLP; the block may have them too.
        tables: arguments of the block whose last axis holds the channels of all heads.
        known: whether the block computes with what these attributes say; elsewhere all heads are computed and the
            results of some are set to zero. None takes it for granted.
    """

    cuts: tuple[Cut, ...]
    inner: str
    hidden: str | None
    attention: tuple[str, ...]
    counts: tuple[str, ...] = ("heads",)
    inners: tuple[str, ...] = ("inner_dim", "inner_kv_dim")
    hiddens: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    known: Callable[[nn.Module], bool] | None = None

    @property
    def parallel(self) -> bool:
        """One layer leads out of the heads and of the channels of the MLP."""
        return any(len(set(cut.into)) > 1 for cut in self.cuts)


def projections(attention: str, out: bool = True) -> tuple[Cut, ...]:
    """The layers of attention in diffusers, those of text that joins in included.

    Args:
        attention: attribute of the block.
        out: it has an output projection of its own.
    """
    heads: tuple[Kind, ...] = ("heads",)
    found = [
        Cut(f"{attention}.to_q", out=heads, norm=f"{attention}.norm_q"),
        Cut(f"{attention}.to_k", out=heads, norm=f"{attention}.norm_k"),
        Cut(f"{attention}.to_v", out=heads),
        Cut(f"{attention}.add_q_proj", out=heads, norm=f"{attention}.norm_added_q"),
        Cut(f"{attention}.add_k_proj", out=heads, norm=f"{attention}.norm_added_k"),
        Cut(f"{attention}.add_v_proj", out=heads),
        Cut(f"{attention}.to_add_out", into=heads),
    ]
    return (*found, Cut(f"{attention}.to_out.0", into=heads)) if out else tuple(found)


def mlp(out: str, *inputs: str) -> tuple[Cut, ...]:
    """The layers of an MLP: the one that leads out of its channels, and those that lead into them."""
    channels: tuple[Kind, ...] = ("channels",)
    return (*(Cut(path, out=channels) for path in inputs), Cut(out, into=channels))


def processed(attention: str | tuple[str, ...], *names: str) -> Callable[[nn.Module], bool]:
    """Whether attention of diffusers runs in one of these processors, with layers of their own for q, k and v.

    Args:
        attention: attributes of a block; it may lack some of several.
        *names: of the classes of processors.
    """
    attributes = (attention,) if isinstance(attention, str) else attention

    def known(block: nn.Module) -> bool:
        parts = [part for name in attributes if (part := getattr(block, name, None)) is not None]
        unfused = not any(getattr(part, "fused_projections", False) or hasattr(part, "to_qkv") for part in parts)
        return unfused and all(type(getattr(part, "processor", None)).__name__ in names for part in parts)

    return known


def attention_and_mlp(attention: str, feed_forward: str, *processors: str, tables: tuple[str, ...] = ()) -> Width:
    """A block of diffusers with attention and an MLP called FeedForward.

    Args:
        attention: attribute of the block.
        feed_forward: the same of the MLP.
        *processors: names of the processors of attention.
        tables: see `Width`.
    """
    return Width(
        cuts=(*projections(attention), *mlp(f"{feed_forward}.net.2", f"{feed_forward}.net.0.proj")),
        inner=f"{attention}.to_out.0.in_features",
        hidden=f"{feed_forward}.net.2.in_features",
        attention=(attention,),
        tables=tables,
        known=processed(attention, *processors),
    )


def attention_beside_mlp(attention: str, *processors: str, hiddens: tuple[str, ...] = ()) -> Width:
    """A block of diffusers whose `proj_out` leads out of attention and of the channels of `proj_mlp` together.

    Args:
        attention: attribute of the block.
        *processors: names of the processors of attention.
        hiddens: see `Width`.
    """
    return Width(
        cuts=(
            *projections(attention, out=False),
            Cut("proj_mlp", out=("channels",)),
            Cut("proj_out", into=("heads", "channels")),
        ),
        inner=f"{attention}.to_q.out_features",
        hidden="proj_out.in_features",
        attention=(attention,),
        hiddens=hiddens,
        known=processed(attention, *processors),
    )
