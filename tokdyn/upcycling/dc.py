"""A DC-DiT from a pretrained DiT: what is copied, what is new, and where tokens lie (arXiv 2603.06351, upcycling)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.models import DCDiT, DiT
from tokdyn.tokens import Grid, cells

COPIED = ("blocks.", "t_embedder.", "y_embedder.")
"""Parameters of a DiT that its DC-DiT begins with; encoder, router, decoder and head are new."""
EMBEDDERS = ("t_embedder.", "y_embedder.")
_FROM_BASE = (
    "sample_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes", "learn_sigma",
    "timestep_shift", "timestep_map", "mlp_norm_eps",
)  # fmt: skip
_OPEN = (
    "target", "patch_size", "router", "encoder_depth", "decoder_depth", "scaffold_width", "sigma",
    "force_ends", "condition_adaptor",
)  # fmt: skip


def dc_settings(base: DiT, target: float = 4.0, patch_size: int | None = None, **settings: Any) -> dict[str, Any]:
    """Settings of the DC-DiT whose blocks are those of a DiT.

    Args:
        base: a DiT with patches of p cells a side.
        target: N, cells per kept token.
        patch_size: of the DC-DiT, a divisor of p; None takes p / sqrt(N), at which as many tokens are kept as the base
            has, or the next smaller divisor.
        **settings: what else `DCDiT` takes and the base leaves open: router, encoder_depth, scaffold_width, ...

    Raises:
        InputError: a setting that follows from the base, or a patch size that does not divide p or is p.
    """
    if not isinstance(target, int | float) or not target > 1.0:
        raise InputError(f"target is {target!r}, expected more than 1 cell per kept token.")
    known = inspect.signature(DCDiT.__init__).parameters
    for name in settings:
        if name in _FROM_BASE:
            raise InputError(f"{name} follows from the base, where it is {base.config[name]!r}; leave it out.")
        if name == "position_scale":
            raise InputError("position_scale follows from the patch sizes of both models; leave it out.")
        if name not in known:
            raise InputError(f"{name} is no setting of a DC-DiT; {', '.join(_OPEN)} are what a base leaves open.")
    whole = base.config.patch_size
    if patch_size is None:
        asked = whole / math.sqrt(target)
        patch_size = max(size for size in range(1, whole + 1) if whole % size == 0 and size <= max(asked, 1.0))
    if not 1 <= patch_size < whole or whole % patch_size:
        raise InputError(
            f"patch_size is {patch_size} and the base has patches of {whole}; cells have to be smaller than its "
            f"patches and divide them."
        )
    shared = {name: base.config[name] for name in _FROM_BASE}
    size = shared["sample_size"]
    shared["sample_size"] = tuple(size) if isinstance(size, list) else size
    shared["timestep_map"] = tuple(shared["timestep_map"])
    scale = patch_size / whole  # a patch of the base is one step of its positions
    own = {"target": target, "patch_size": patch_size, "position_scale": scale, "condition_adaptor": True}
    return {**shared, **own, **settings}


@torch.no_grad()
def to_dc(base: DiT, target: float = 4.0, patch_size: int | None = None, **settings: Any) -> DCDiT:
    """A DC-DiT with the blocks and the embedders of a DiT; the embedders are frozen.

    The encoder starts as the patch embedding of the base where cells are half its patches and the scaffold is wide
    enough; the rest starts as in any `DCDiT`, from torch's global generator. Tokens have the positions of the base: the
    cell at the upper left corner of one of its patches stands where that patch stood.

    Args:
        base: not changed; nothing is shared with it.
        target: N, cells per kept token.
        patch_size: see `dc_settings`.
        **settings: see `dc_settings`.

    Returns:
        The model in training mode, on the base's device and in its type.

    Raises:
        InputError: see `dc_settings`.
    """
    student = DCDiT(**dc_settings(base, target, patch_size, **settings))
    own = dict(student.named_parameters())
    for name, parameter in base.named_parameters():
        if name.startswith(COPIED):
            own[name].copy_(parameter)
    _embed_as(student, base)
    if not (student.config.official_init or student.pos_embed.is_meta):
        student.calibrate_on_noise()  # again, now for this encoder
    for name, parameter in student.named_parameters():
        if name.startswith(EMBEDDERS):
            parameter.requires_grad_(False)
    like = next(base.parameters())
    student = student.to(like.device)
    if like.dtype != next(student.parameters()).dtype:
        student = student.to(like.dtype)
    result: DCDiT = student.train()
    return result


def _embed_as(student: DCDiT, base: DiT) -> None:
    """Let the encoder start as the patch embedding of the base, up to its norm.

    A patch of 2x2 cells lies in the 3x3 window of its corner cell. The first convolution copies its pixels, one to a
    channel, the residual branches add nothing yet, and the last skip projection is the embedding of the base. The norm
    at the end divides by the root mean square of a token, and its weight is the one that white noise has on average.
    """
    cell, patch = student.config.patch_size, base.config.patch_size
    pixels = base.config.in_channels * patch * patch
    convolution: Any = student.x_embedder.proj
    layers: Any = student.encoder.layers
    skip = layers[-1].skip_proj
    if patch != 2 * cell or convolution.out_channels < pixels or skip is None:
        return
    whole: Any = base.x_embedder.proj
    embedding, bias = whole.weight, whole.bias
    convolution.weight[:pixels].zero_()
    convolution.bias[:pixels].zero_()
    skip.weight.zero_()
    place = 0
    for channel in range(base.config.in_channels):
        for row in range(patch):
            for column in range(patch):
                inside = (row % cell) * cell + column % cell  # as pixel_unshuffle orders what is in a cell
                source = channel * cell * cell + inside
                convolution.weight[place, source, 1 + row // cell, 1 + column // cell] = 1.0
                skip.weight[:, place, 0, 0] = embedding[:, channel, row, column]
                place += 1
    skip.bias.copy_(bias)
    for layer in layers:
        layer.conv2.weight.zero_()
        layer.conv2.bias.zero_()
    power = embedding.square().sum(dim=(1, 2, 3)) + bias.square()
    student.encoder.norm.weight.fill_(power.mean().sqrt())


def stride(student: DCDiT) -> int:
    """Cells of a DC-DiT on a side of a patch of the base that its blocks come from.

    Raises:
        InputError: it does not come from a base.
    """
    scale = float(student.config.position_scale)
    if scale >= 1.0:
        raise InputError(
            "this DC-DiT was not made from a DiT: its position_scale is 1, so no cell is the corner of a patch."
        )
    return round(1.0 / scale)


def corner_plan(grid: Grid, step: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed plan of the first phase: keep the upper left cell of every patch of the base.

    Args:
        grid: (rows, columns) of the DC-DiT.
        step: cells on a side of a patch.
        device: of the result.

    Returns:
        (N,) bool, N cells. The kept tokens, in raster order, are those of the base.
    """
    corners = [torch.arange(size, device=device) % step == 0 for size in grid]
    return (corners[0][:, None] & corners[1]).reshape(cells(grid))


def patch_of(cell: Tensor, grid: Grid, step: int) -> Tensor:
    """The patch of the base that cells lie in: (T,) int64 cells of a grid to (T,) int64 places in raster order."""
    rows, columns = cell // grid[1], cell % grid[1]
    return (rows // step) * (grid[1] // step) + columns // step
