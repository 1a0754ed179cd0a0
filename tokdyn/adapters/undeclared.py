"""Transformers of diffusers that have no declaration: which methods inference makes work on them, and why no others.

`DIFFUSERS` is the version whose classes are all here or in a declaration.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokdyn.adapters.registry import known_adapters

DIFFUSERS = "0.42"
"""The minor version of diffusers whose transformer classes are listed."""


@dataclass(frozen=True)
class Undeclared:
    """A class without a declaration.

    Attributes:
        methods: names of the methods that can be attached to it, with an inferred adapter.
        reason: why the others cannot, a clause without a full stop.
    """

    methods: tuple[str, ...]
    reason: str


_INFERRED = ("DepthSkip", "FeatureCache")

UNDECLARED: dict[str, Undeclared] = {
    "DreamLiteTransformer2DModel": Undeclared(_INFERRED, "it is a part of a UNet, whose convolutions need all tokens"),
    "MiniMaxMusic3RVQDepthDecoder": Undeclared(
        ("DepthSkip",), "it has no noise level, and its few tokens are the codes of one moment of sound"
    ),
    "PriorTransformer": Undeclared(_INFERRED, "its tokens are text and embeddings of an image, which have no grid"),
    "RFD4ProteinaTransformer": Undeclared(
        ("DepthSkip",), "it has two noise levels, and features for every pair of its tokens, which are amino acids"
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Undeclared(
        (), "frames attend to earlier ones by a cache of their keys and values"
    ),
    "T5FilmDecoder": Undeclared((), "its blocks return tuples, and its noise level is called decoder_noise_time"),
    "Transformer2DModel": Undeclared(_INFERRED, "it is a part of a UNet, whose convolutions need all tokens"),
    "TransformerTemporalModel": Undeclared(
        (), "it is a part of a UNet, and its blocks get every place of the image as a sample of its own"
    ),
}
"""By the name of the class."""


def undeclared() -> dict[str, Undeclared]:
    """Return the classes of `UNDECLARED` for which no adapter is registered, in alphabetical order."""
    declared = {name for adapter in known_adapters() for name in adapter.classes}
    return {name: UNDECLARED[name] for name in sorted(UNDECLARED) if name not in declared}
