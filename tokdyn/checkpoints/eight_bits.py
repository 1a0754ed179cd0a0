"""Store the matrices of a model in eight bits with a scale for each row, and restore them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.reading import one_line

SCALE = ".row_scale"
"""Ending of the name under which the scales of a matrix are stored."""
_LARGEST = 127  # of a signed byte, on both sides of zero
_FEWEST = 1024  # elements of a tensor that is worth rounding


def to_eight_bits(tensors: Mapping[str, Tensor], exact: Sequence[str] = ()) -> dict[str, Tensor]:
    """Round the matrices of a state dict to eight bits, and everything else to fp16.

    A row w of a matrix, or all weights of one output channel of a convolution, becomes the integers `round(w / s)` with
    the scale `s = max|w| / 127`, so that no element is wrong by more than s / 2.

    Args:
        tensors: tensors by name.
        exact: names of modules whose tensors stay in fp32, such as those of a router, which decides by small
            differences.

    Returns:
        Tensors by name; the scales (rows,) of a matrix are stored beside it, under its name with `SCALE` at the end.
    """
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if not tensor.is_floating_point() or set(exact).intersection(name.split(".")):
            stored[name] = tensor.contiguous()
        elif tensor.dim() < 2 or len(tensor) == 1 or tensor.numel() < _FEWEST:
            stored[name] = tensor.to(torch.float16).contiguous()
        else:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
            stored[name] = (rows / scale[:, None]).round().to(torch.int8).view_as(tensor).contiguous()
            stored[name + SCALE] = scale
    return stored


def from_eight_bits(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Restore the matrices that `to_eight_bits` has rounded, in fp32; other tensors are returned as they are.

    Args:
        tensors: tensors by name, of any checkpoint.
        origin: name of the checkpoint, for error messages.

    Raises:
        CheckpointError: a matrix has another number of rows than scales.
    """
    restored = {}
    for name, tensor in tensors.items():
        matrix = name.removesuffix(SCALE)
        if matrix != name and matrix in tensors and tensors[matrix].dtype == torch.int8:
            continue
        scale = tensors.get(name + SCALE) if tensor.dtype == torch.int8 else None
        if scale is not None:
            if scale.shape != tensor.shape[:1]:
                raise CheckpointError(
                    f"{origin} has {tensor.shape[:1].numel()} rows of {one_line(name, 80)} and {scale.numel()} "
                    "scales for them; copy or convert "
                    "it again."
                )
            tensor = tensor.float() * scale.float().reshape(-1, *[1] * (tensor.dim() - 1))
        restored[name] = tensor
    return restored
