"""Infer the settings of a model from the shapes of its tensors. All tensors are given by tokdyn's names."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.limits import DEPTH
from tokdyn.ops import sincos_position
from tokdyn.reading import one_line

_DIGITS, _GAP = 9, 16  # digits of a number of a block, and numbers by which missing blocks are told from hostile ones

ROUTERS = {"score": "spatial_predictability", "query": "cosine"}
"""The kind of router for the name of a submodule that no other kind has."""


def dit_settings(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """Infer the settings of a `DiT`, apart from num_heads and sample_size.

    Args:
        tensors: tensors of the model.
        origin: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: a tensor that settings are inferred from is missing or has an impossible shape.
    """
    shared = _shared_settings(tensors, origin)
    _, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, origin)
    shared |= {"patch_size": patch, "in_channels": channels}
    return shared | _output(tensors, channels * patch * patch, origin)


def dcdit_settings(tensors: Mapping[str, Tensor], origin: str, patch: int) -> dict[str, Any]:
    """Infer the settings of a `DCDiT`, apart from num_heads and sample_size.

    Args:
        tensors: tensors of the model.
        origin: name of the checkpoint, for error messages.
        patch: the patch size, which the shapes do not determine; 1 in the official code.

    Raises:
        CheckpointError: a tensor that settings are inferred from is missing or has an impossible shape, or the patch
            size is impossible.
    """
    shared = _shared_settings(tensors, origin)
    narrow, channels, _, _ = _shape(tensors, "x_embedder.proj.weight", 4, origin)
    if not isinstance(patch, int) or patch < 1:
        raise CheckpointError(f"patch_size={patch!r}, given for {origin}, must be an integer of at least 1.")
    if channels % (patch * patch):
        raise CheckpointError(f"{origin} embeds {channels} channels per token, which patch_size={patch} cannot divide.")
    parts = {name.split(".")[2] for name in tensors if name.startswith("chunking.router.")}
    shared |= {
        "router": next((router for part, router in ROUTERS.items() if part in parts), "random"),
        "patch_size": patch,
        "in_channels": channels // (patch * patch),
        "scaffold_width": narrow,
        "encoder_depth": _count(tensors, "encoder.layers.", origin),
        "decoder_depth": _count(tensors, "decoder.layers.", origin),
        "condition_adaptor": "adaptor.weight" in tensors,
    }
    return shared | _output(tensors, channels, origin)


def input_size(
    tensors: Mapping[str, Tensor], patch: int, sample_size: int | tuple[int, int] | None, origin: str
) -> tuple[int, int]:
    """Determine the input size (rows, columns) in pixels or latent pixels.

    It comes from `sample_size` or, if that is None, from the number of positions in the position table. A sine-cosine
    table also tells rows from columns; of any other table the grid is taken to be square. If there are both a size and
    a table, they must agree.

    Args:
        tensors: tensors of the model; "pos_embed" (1, N, D) may be missing.
        patch: patch size.
        sample_size: the size as the caller or a config.json gives it; one number is a square.
        origin: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: there is neither a size nor a table, they contradict each other, or there is no size and the
            table is not sine-cosine and N is not a square.
    """
    size = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    if size is not None and not (isinstance(size, tuple) and [type(side) for side in size] == [int, int]):
        raise CheckpointError(f"sample_size={sample_size!r} for {origin} must be an integer or (rows, columns).")
    if "pos_embed" not in tensors:
        if size is None:
            raise CheckpointError(
                f"{origin} has no position table; set sample_size to the rows and columns of the input."
            )
        return size
    table = tensors["pos_embed"]
    cells = _shape(tensors, "pos_embed", 3, origin)[1]
    grid = grid_of_table(table[0])
    if size is None:
        if grid is None and isqrt(cells) ** 2 != cells:
            raise CheckpointError(
                f"{origin} has {cells} positions, which is not a square; set sample_size=(rows, columns)."
            )
        rows, columns = grid or (isqrt(cells), isqrt(cells))
        return rows * patch, columns * patch
    if (size[0] // patch) * (size[1] // patch) != cells:
        raise CheckpointError(
            f"sample_size={sample_size} with patch_size={patch} has {(size[0] // patch) * (size[1] // patch)} tokens, "
            f"but {origin} has {cells} positions; set sample_size to the size that it was trained with."
        )
    if grid is not None and grid != (size[0] // patch, size[1] // patch):
        raise CheckpointError(
            f"sample_size={sample_size} with patch_size={patch} contradicts {origin}, whose positions are those of a "
            f"{grid[0]}x{grid[1]} grid of tokens; set sample_size=({grid[0] * patch}, {grid[1] * patch})."
        )
    return size


def grid_of_table(table: Tensor) -> tuple[int, int] | None:
    """Return the token grid (rows, columns) that a sine-cosine table (N, D) was computed for; None for other tables."""
    cells, width = table.shape
    if width % 4 or not table.is_floating_point():
        return None
    table = table.float()
    changes = (table[:, width // 2 :] - table[0, width // 2 :]).abs().amax(dim=1) > 0.1
    columns = int(changes.nonzero()[0]) if bool(changes.any()) else cells
    if cells % columns:
        return None
    grid = (cells // columns, columns)
    # bf16 tables have a relative error of 2**-9; tables of other grids differ by far more than the tolerance.
    return grid if torch.allclose(table, sincos_position(grid, width), atol=1e-2) else None


def _shared_settings(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """Infer the settings that `DiT` and `DCDiT` have in common."""
    width = _shape(tensors, "blocks.0.attn.qkv.weight", 2, origin)[1]
    hidden = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, origin)[0]
    classes = _shape(tensors, "y_embedder.embedding_table.weight", 2, origin)[0] - 1
    ratio = hidden / width
    # The models compute int(width * ratio); a slightly larger ratio undoes a quotient that was rounded down.
    ratio = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    return {
        "hidden_size": width,
        "depth": _count(tensors, "blocks.", origin),
        "mlp_ratio": ratio,
        "num_classes": classes,
    }


def _output(tensors: Mapping[str, Tensor], inputs: int, origin: str) -> dict[str, Any]:
    """Infer learn_sigma from the outputs per token of the final layer, given the inputs per token."""
    outputs = _shape(tensors, "final_layer.linear.weight", 2, origin)[0]
    if outputs not in (inputs, 2 * inputs):
        raise CheckpointError(
            f"{origin} predicts {outputs} values per token from {inputs}; expected {inputs}, or {2 * inputs} with "
            "learned variance. If its patch size is not the assumed one, set patch_size."
        )
    return {"learn_sigma": outputs == 2 * inputs}


def _count(tensors: Mapping[str, Tensor], prefix: str, origin: str) -> int:
    """Return the number of numbered modules under a prefix, such as "blocks.": one more than the largest number."""
    parts = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    numbers = {part for part in parts if part.isdecimal()}
    if any(len(part) > _DIGITS or int(part) > 2 * len(numbers) + _GAP for part in numbers):
        largest = max(numbers, key=lambda part: (len(part), part))
        raise CheckpointError(
            f"{origin} has {prefix}{one_line(largest, 20)}, but tensors of only {len(numbers)} of so many; copy "
            "or convert it "
            "again."
        )
    count = 1 + max(map(int, numbers), default=-1)
    if excess := DEPTH.excess(count):
        raise CheckpointError(f"{origin} has {prefix}{count - 1}; these are {excess}.")
    return count


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int, origin: str) -> tuple[int, ...]:
    """Return the shape of a tensor; raise a CheckpointError if it is missing or does not have `dims` dimensions."""
    if name not in tensors:
        raise CheckpointError(f"{origin} lacks {name!r} (tokdyn's name), from which settings are inferred.")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims or 0 in shape:
        raise CheckpointError(f"{origin} has {name!r} of shape {shape}; expected {dims} dimensions, none of them 0.")
    return shape
