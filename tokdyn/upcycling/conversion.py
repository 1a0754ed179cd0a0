"""A DC-DiT from a pretrained DiT: what is copied, what is new, and where tokens lie (arXiv 2603.06351, upcycling)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokdyn.attach.entry import attachment_of, wrap
from tokdyn.bases import open_base
from tokdyn.errors import InputError
from tokdyn.methods import Chunking, DynamicWidth, Method
from tokdyn.models import DCDiT, DiT

CALIBRATED = {
    "merge": "attach tokdyn.TokenMerge() with tokdyn.wrap",
    "skip": "call tokdyn.calibrate(model, calls, tokdyn.DepthSkip(), flops=...)",
    "cache": "call tokdyn.calibrate(model, calls, tokdyn.FeatureCache(), flops=...)",
}
"""Methods that are not trained into a model, and what to do instead."""


COPIED = ("blocks.", "t_embedder.", "y_embedder.")
"""Parameters of a DiT that its DC-DiT begins with; encoder, router, decoder and head are new."""
EMBEDDERS = ("t_embedder.", "y_embedder.")
_FROM_BASE = (
    "sample_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes", "learn_sigma",
    "timestep_shift", "timestep_map", "mlp_norm_eps",
)  # fmt: skip
_OPEN = (
    "target", "patch_size", "router", "encoder_depth", "decoder_depth", "scaffold_width", "smoothing",
    "smoothing_sigma", "force_ends", "condition_adaptor",
)  # fmt: skip


def check_method(name: Any) -> None:
    """Refuse what is not trained into a model.

    Raises:
        InputError: names the method and what to do.
    """
    if name in CALIBRATED:
        raise InputError(f"{name!r} is not trained into a model; {CALIBRATED[name]}.")
    if name not in ("dc", "dydit"):
        more = ", ".join(CALIBRATED)
        raise InputError(f"method {name!r} is unknown; known are dc and dydit, and {more} without training.")


def upcycle(base: nn.Module | str | Path, method: str | Sequence[str] = "dc", **settings: Any) -> Any:
    """Make the model that training goes on with from a pretrained one, which is left as it is.

    ``dc`` makes a `DCDiT` of a `DiT` (arXiv 2603.06351): blocks and embedders are copied, the embedders frozen;
    encoder, router, decoder and head are new. Of any other transformer that an adapter knows it makes a copy with a
    `Chunking` around its blocks, which computes what the model did until it drops tokens. ``dydit`` attaches a
    `DynamicWidth` (arXiv 2410.03456), whose gates start open.

    Args:
        base: a model, or what `tokdyn models` lists, the path of a checkpoint, or an id of the hub.
        method: "dc", "dydit", or both in one list.
        **settings: of the methods: target, patch_size, router, encoder_depth, ... of ``dc``; those that begin with
            ``width_`` are settings of `DynamicWidth`, as in width_target=0.7.

    Returns:
        The new model, in training mode. `tokdyn.upcycling.report(base, model)` says what was copied, new and frozen.

    Raises:
        InputError: an unknown method, or one that is not trained; settings that do not fit.
        UnsupportedModelError: no adapter knows the model.
    """
    names = list(method) if isinstance(method, list | tuple) else [method]
    for name in names:
        check_method(name)
    if not names or len(set(names)) < len(names):
        raise InputError(f"the methods are {names}; name at least one, each once.")
    model = base if isinstance(base, nn.Module) else open_base(base)
    if attachment_of(model) is not None:
        raise InputError(f"this {type(model).__name__} is wrapped; call tokdyn.unwrap on it first.")
    width = {key.removeprefix("width_"): value for key, value in settings.items() if key.startswith("width_")}
    other = {key: value for key, value in settings.items() if not key.startswith("width_")}
    if width and "dydit" not in names:
        raise InputError(f"width_{next(iter(width))} is a setting of dydit, which is not among the methods.")
    if other and "dc" not in names:
        raise InputError(f"{next(iter(other))} is a setting of dc, which is not among the methods.")
    attached: list[Method] = []
    if "dc" not in names:
        student: Any = copy.deepcopy(model)
    elif isinstance(model, DiT):
        student = to_dc(model, **other)
    elif isinstance(model, DCDiT):
        raise InputError("the base is a DC-DiT already; train it on, or attach methods with tokdyn.wrap.")
    else:
        student = copy.deepcopy(model)
        attached.append(Chunking(**other))
    if "dydit" in names:
        attached.append(DynamicWidth(**width))
    return wrap(student.train(), attached) if attached else student


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
