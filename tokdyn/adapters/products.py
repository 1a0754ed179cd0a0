"""Over which rows the matrix products of a block run: what the cost of a block follows from."""

from __future__ import annotations

from dataclasses import dataclass

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
