"""Find the embedding of the timestep in a model, which a cache may compare in place of tokens.

Coefficients that were published for TeaCache (arXiv 2411.19108) belong to one of two tensors: the embedding itself, or
its projection, from which blocks take shift, scale and gate. Adapters name an argument of the blocks that is one of
them in `Blocks.time` and `Blocks.time_projection`. Otherwise the embedding is what the module returns that embeds the
timestep, which `ModelAdapter.time` names or `time_embedder` finds.
"""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter
from tokdyn.errors import UnsupportedModelError

_CLASSES = {"TimestepEmbedding", "TimestepEmbedder"}
_NAMES = re.compile(r"t(ime)?(step)?s?_(\w+_)?embed\w*")


def time_embedder(model: nn.Module, adapter: ModelAdapter) -> nn.Module | None:
    """Return the module that embeds the timestep: the declared one, or the first outside of blocks that looks like it.

    Args:
        model: the model.
        adapter: the adapter of the model.
    """
    named: dict[str, nn.Module] = dict(model.named_modules())
    if adapter.time is not None:
        return named.get(adapter.time)
    paths = tuple(f"{blocks.path}." for blocks in adapter.blocks)
    outside = [(name, module) for name, module in named.items() if name and not f"{name}.".startswith(paths)]
    for name, module in outside:
        classes = {base.__name__ for base in type(module).__mro__}
        if classes & _CLASSES and "guidance" not in name:
            return module
    return next((module for name, module in outside if _NAMES.fullmatch(name.rpartition(".")[2])), None)


def missing_time(
    model: nn.Module, adapter: ModelAdapter, embedding: Literal["time", "projected_time"] | None
) -> str | None:
    """Return why a method cannot read an embedding of the timestep; None if it can, or reads none.

    Returns:
        A clause for a message, without a full stop.
    """
    first = adapter.blocks[0]
    if embedding == "projected_time" and first.time_projection is None:
        return f"the adapter {adapter.name!r} names no time_projection= among the arguments of its blocks"
    if embedding == "time" and first.time is None and time_embedder(model, adapter) is None:
        return f"no module outside of its blocks embeds the timestep; give the adapter {adapter.name!r} time="
    return None


def embedding_in(embedding: str, blocks: Blocks, named: Arguments | None, noted: Tensor | None, batch: int) -> Tensor:
    """Return an embedding of the timestep with one row a sample, (B, ...).

    Args:
        embedding: "time" or "projected_time".
        blocks: the first blocks.
        named: the arguments of the first block, by name; None in a model that has none.
        noted: what the module returned that embeds the timestep; None if it did not run.
        batch: B.

    Raises:
        UnsupportedModelError: there is none.
    """
    name = blocks.time if embedding == "time" else blocks.time_projection
    found = noted if name is None or named is None else named.get(name)
    if found is None or (len(found) % batch and batch % len(found)):
        raise UnsupportedModelError(
            f"FeatureCache(indicator={embedding!r}) found no embedding of the timestep before the first block; use "
            "another indicator."
        )
    rows = found.detach()
    if len(rows) < batch:
        return rows.repeat(batch // len(rows), *[1] * (rows.dim() - 1))
    if len(rows) == batch:
        return rows
    if blocks.rounds:  # one timestep of every sample, then another
        return rows.reshape(-1, batch, *rows.shape[1:]).transpose(0, 1)
    return rows.reshape(batch, -1, *rows.shape[1:])
