"""Count the rows that the FLOPs of a block depend on, beside its image tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from tokdyn.adapters.base import Blocks


def other_tokens(named: Mapping[str, Any], blocks: Blocks, image: int) -> tuple[int, int]:
    """Count the text tokens that a block gets in both its streams, and the encoder tokens of its cross-attention."""
    products, text = blocks.products, named.get(blocks.text or "")
    encoder = named.get(products.context) if products is not None and products.cross else None
    encoder = encoder[0] if isinstance(encoder, tuple) else encoder
    beside = named[blocks.tokens].shape[1] - image
    return beside + (0 if text is None else text.shape[1]), 0 if encoder is None else encoder.shape[1]


class Counted(Protocol):
    """What was counted of one computation of a block; see `tokdyn.trace.calls.BlockTrace`."""

    samples: int
    text: int
    given: tuple[tuple[str, int | Tensor], ...]


def text_stream(counted: Counted, blocks: Blocks) -> int:
    """Return how many text tokens of each sample lie in a stream of their own; all if none are among image tokens."""
    if blocks.image == "all" or blocks.text is None:
        return counted.text
    return int(dict(counted.given)[blocks.text]) // counted.samples


def rounds_of(named: Mapping[str, Any], blocks: Blocks, batch: int) -> int:
    """Count the embeddings of timesteps that a block gets for each sample."""
    held = [named[name] for name in blocks.rounds if named.get(name) is not None]
    return sum(len(value) for value in held) // batch if held else 1


def counted_rows(named: Mapping[str, Any], blocks: Blocks, batch: int) -> tuple[tuple[str, int | Tensor], ...]:
    """Count the rows of the arguments of a block that FLOPs depend on, of all its samples together.

    Returns:
        Pairs of a name, as in `Products.over`, and a number of rows. True counts as a row of every sample. A flag on an
        accelerator stays a tensor, so that nobody waits for it.
    """
    return tuple((name, _rows_of(named, name, batch)) for name in blocks.counted)


def _rows_of(named: Mapping[str, Any], name: str, batch: int) -> int | Tensor:
    """Count the rows of an argument, or of an item of it, of all samples together."""
    name, _, item = name.partition(".")
    value: Any = named.get(name)
    if isinstance(value, (tuple, list)):
        value = value[int(item or 0)]
    elif item:
        value = None
    if not isinstance(value, Tensor):
        return batch * int(value or 0)
    if not value.dim():
        return value
    return value.numel() // value.shape[-1] if value.dim() > 1 else len(value)
