"""Build a student from a pretrained model: copy the tensors that both have, and initialise the new ones."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from einops import rearrange
from torch import nn

from tokdyn.attach import accept_methods, attachment_of, wrap
from tokdyn.bases import open_base
from tokdyn.cost import model_parts
from tokdyn.cost.blocks import PARTS
from tokdyn.errors import InputError, RecipeError
from tokdyn.methods import Chunking, DynamicWidth, Method
from tokdyn.methods.registry import short_name
from tokdyn.models import DCDiT, DiT
from tokdyn.upcycling.settings import TRAINED, AfterSettings, UpcycleSettings

INSTEAD_OF_TRAINING = {
    "merge": "attach tokdyn.TokenMerge() with tokdyn.wrap",
    "skip": "call tokdyn.calibrate(model, calls, tokdyn.DepthSkip(), flops=...)",
    "cache": "call tokdyn.calibrate(model, calls, tokdyn.FeatureCache(), flops=...)",
}
"""For each method that needs no training, the advice that an error gives."""
EMBEDDERS = ("t_embedder.", "y_embedder.")
"""Prefixes of the parameters that embed timestep and class."""
COPIED = ("blocks.", *EMBEDDERS)
"""Prefixes of the parameters that a DC-DiT copies from a DiT; encoder, router, decoder and head are new."""
_FROM_BASE = (
    "sample_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes", "learn_sigma",
    "timestep_shift", "timestep_map", "mlp_norm_eps",
)  # fmt: skip
_FREE = (
    "target", "patch_size", "router", "encoder_depth", "decoder_depth", "scaffold_width", "sigma",
    "force_ends", "condition_adaptor",
)  # fmt: skip


def check_method(name: Any) -> None:
    """Refuse a method that upcycling does not train.

    Raises:
        InputError: The method is unknown, or needs no training.
    """
    name = short_name(name)
    if name in INSTEAD_OF_TRAINING:
        raise InputError(f"{name!r} needs no training; {INSTEAD_OF_TRAINING[name]}.")
    if name not in TRAINED:
        untrained = ", ".join(INSTEAD_OF_TRAINING)
        raise InputError(
            f"There is no method {name!r}; choose {' or '.join(TRAINED)} ({untrained} are attached without training)."
        )


def upcycle(base: nn.Module | str | Path, method: str | Sequence[str] = "dc", **settings: Any) -> Any:
    """Build a student with fewer tokens or less width from a pretrained model, ready to be trained.

    ``dc`` makes a `DCDiT` from a `DiT` (arXiv 2603.06351): the blocks and the embedders are copied, the embedders are
    frozen, and encoder, router, decoder and head are new. From any other transformer that has an adapter it makes a
    copy with `Chunking` attached, whose outputs equal the base's as long as all tokens are kept. ``dydit`` attaches
    `DynamicWidth` (arXiv 2410.03456), whose gates are open at first, so that everything is computed.

    Args:
        base: A model, which is not changed; a name that `tokdyn models` lists; the path of a checkpoint; or a hub id.
        method: "dc", "dydit", or a list of both.
        **settings: Settings of ``dc``, such as target, patch_size, router or encoder_depth, and settings of
            `DynamicWidth` with the prefix ``width_``, such as width_target=0.7.

    Returns:
        The student, in training mode. `tokdyn.upcycling.report(base, student)` lists what is copied, new and frozen.

    Raises:
        InputError: A method is unknown or needs no training, a setting is wrong, or the base is wrapped or a DC-DiT.
        UnsupportedModelError: There is no adapter for the model.
    """
    names = [short_name(name) for name in (method if isinstance(method, list | tuple) else [method])]
    for name in names:
        check_method(name)
    if not names or len(set(names)) < len(names):
        raise InputError(f"method is {names}; name at least one method, and each once.")
    model = base if isinstance(base, nn.Module) else open_base(base)
    if attachment_of(model) is not None:
        raise InputError(f"The base, a {type(model).__name__}, is wrapped; call tokdyn.unwrap on it first.")
    width_settings = {key.removeprefix("width_"): value for key, value in settings.items() if key.startswith("width_")}
    dc_only = {key: value for key, value in settings.items() if not key.startswith("width_")}
    if width_settings and "dydit" not in names:
        raise InputError(
            f"width_{next(iter(width_settings))} is a setting of dydit, which is not among the methods; add dydit, or "
            "remove the setting."
        )
    if dc_only and "dc" not in names:
        raise InputError(
            f"{next(iter(dc_only))} is a setting of dc, which is not among the methods; add dc, or remove the setting."
        )
    if "dc" in names and isinstance(model, DiT):
        student: Any = to_dc(model, **dc_only)
        names.remove("dc")
    elif "dc" in names and isinstance(model, DCDiT):
        raise InputError("The base is a DC-DiT already; continue its training, or attach methods with tokdyn.wrap.")
    else:
        student = copy.deepcopy(model)
    attached = attached_methods(names, dc_only, width_settings)
    return accept_methods(wrap(student.train(), attached)) if attached else student


def attached_methods(
    names: Sequence[str], chunking: Mapping[str, Any], width: Mapping[str, Any] = MappingProxyType({})
) -> list[Method]:
    """Return the methods that upcycling attaches to a model and trains, with settings for each."""
    built: list[Method] = [Chunking(**chunking)] if "dc" in names else []
    return [*built, DynamicWidth(**width)] if "dydit" in names else built


def build_student(settings: UpcycleSettings, base: DiT, chunked: bool, **overrides: Any) -> nn.Module:
    """Build the student of an upcycling run, with the methods of its recipe attached.

    Args:
        settings: The section `upcycle` of the recipe.
        base: The pretrained model, which is not changed.
        chunked: Whether the student is a DC-DiT; otherwise it is a copy of the base.
        **overrides: Settings of the DC-DiT, see `dc_settings`; ignored if `chunked` is False.

    Returns:
        The student, in training mode. Training sets what its methods count to the steps taken, see `count_steps`.

    Raises:
        InputError: An override is wrong, or a method cannot be attached.
        RecipeError: A method to attach after training has a FLOPs target that it cannot reach on this model.
    """
    student: Any = to_dc(base, **overrides) if chunked else copy.deepcopy(base).train()
    methods = [each.build() for each in settings.methods]
    _check_skipping(settings.after, student)
    return wrap(student, methods) if methods else student  # type: ignore[no-any-return]


def _check_skipping(after: Sequence[AfterSettings], model: nn.Module) -> None:
    """Raise a RecipeError if skip has a FLOPs target below the share that is left when all blocks are skipped."""
    parts = model_parts(model)
    least = sum(flops for name, flops in parts.items() if name not in PARTS) / sum(parts.values())
    for each in after:
        if each.method == "skip" and each.flops is not None and each.flops < least:
            raise RecipeError(
                f"upcycle.after: skip cannot reach flops={each.flops:g}, because the parts outside the blocks take "
                f"{least:.3g} of the FLOPs; raise flops above that."
            )


def dc_settings(base: DiT, target: float = 4.0, patch_size: int | None = None, **settings: Any) -> dict[str, Any]:
    """Return the settings of a DC-DiT that can copy the blocks of a DiT.

    Args:
        base: A DiT with patches of p x p pixels.
        target: N, cells per kept token.
        patch_size: Side of the DC-DiT's cells in pixels, a divisor of p smaller than p. None takes p / sqrt(N), with
            which it keeps as many tokens as the base has, or the largest divisor below that.
        **settings: Other settings of `DCDiT` that the base does not determine: router, encoder_depth, scaffold_width,
            ...

    Returns:
        All settings of `DCDiT`.

    Raises:
        InputError: A setting is determined by the base or is unknown, the target is not above 1, or the patch size is
            not a smaller divisor of p.
    """
    if not isinstance(target, int | float) or not target > 1.0:
        raise InputError(f"target is {target!r}, expected more than 1 cell per kept token; set it to 4, for example.")
    known = inspect.signature(DCDiT.__init__).parameters
    for name in settings:
        if name in _FROM_BASE:
            raise InputError(f"{name} is determined by the base, where it is {base.config[name]!r}; remove it.")
        if name == "position_scale":
            raise InputError("position_scale is determined by the patch sizes of base and student; remove it.")
        if name not in known:
            raise InputError(f"{name} is not a setting of a DC-DiT; choose from {', '.join(_FREE)}.")
    base_patch = base.config.patch_size
    if patch_size is None:
        wanted = base_patch / math.sqrt(target)
        patch_size = max(
            size for size in range(1, base_patch + 1) if base_patch % size == 0 and size <= max(wanted, 1.0)
        )
    if not 1 <= patch_size < base_patch or base_patch % patch_size:
        raise InputError(
            f"patch_size is {patch_size}, but the base has patches of {base_patch}; choose a smaller divisor of "
            f"{base_patch}."
        )
    inherited = {name: base.config[name] for name in _FROM_BASE}
    size = inherited["sample_size"]
    inherited["sample_size"] = tuple(size) if isinstance(size, list) else size
    inherited["timestep_map"] = tuple(inherited["timestep_map"])
    scale = patch_size / base_patch  # neighbouring patches of the base stay one unit of position apart
    own = {"target": target, "patch_size": patch_size, "position_scale": scale, "condition_adaptor": True}
    return {**inherited, **own, **settings}


@torch.no_grad()
def to_dc(base: DiT, target: float = 4.0, patch_size: int | None = None, **settings: Any) -> DCDiT:
    """Build a DC-DiT with the blocks and the embedders of a DiT, and freeze the embedders.

    A cell is the square of pixels that becomes one token of the DC-DiT; a patch of the base covers several. If cells
    are half as wide as patches and the scaffold is wide enough, the encoder is initialised to compute the base's patch
    embedding. All other parts are initialised as in any new `DCDiT`, from torch's global generator. The upper left cell
    of each patch has the position embedding of that patch.

    Args:
        base: The pretrained model, which is not changed and shares no tensor with the result.
        target: N, cells per kept token.
        patch_size: Side of the DC-DiT's cells in pixels, see `dc_settings`.
        **settings: Other settings of `DCDiT`, see `dc_settings`.

    Returns:
        The DC-DiT, in training mode, on the device and in the dtype of the base.

    Raises:
        InputError: A setting is wrong, see `dc_settings`.
    """
    student = DCDiT(**dc_settings(base, target, patch_size, **settings))
    parameters = dict(student.named_parameters())
    for name, parameter in base.named_parameters():
        if name.startswith(COPIED):
            parameters[name].copy_(parameter)
    _start_as_patch_embedding(student, base)
    if not (student.config.official_init or student.pos_embed.is_meta):
        student.calibrate_on_noise()  # the router was calibrated for the encoder before it changed
    for name, parameter in student.named_parameters():
        if name.startswith(EMBEDDERS):
            parameter.requires_grad_(False)
    reference = next(base.parameters())
    student = student.to(reference.device)
    if reference.dtype != next(student.parameters()).dtype:
        student = student.to(reference.dtype)
    result: DCDiT = student.train()
    return result


def _start_as_patch_embedding(student: DCDiT, base: DiT) -> None:
    """Initialise the encoder so that it computes the patch embedding of the base, up to the norm at its end.

    A patch of 2x2 cells lies in the 3x3 window around its upper left cell. The first convolution copies each pixel of
    the patch to a channel of its own, the residual branches are zero, and the last skip projection is the patch
    embedding. The norm divides a token by its root mean square, so its weight is set to the root mean square that white
    noise has after the embedding.

    Does nothing if cells are not half as wide as patches, if the scaffold has fewer channels than a patch has values,
    or if the last layer of the encoder has no skip projection.
    """
    cell, patch = student.config.patch_size, base.config.patch_size
    channels = base.config.in_channels
    pixels = channels * patch * patch
    convolution: Any = student.x_embedder.proj
    layers: Any = student.encoder.layers
    skip = layers[-1].skip_proj
    if patch != 2 * cell or convolution.out_channels < pixels or skip is None:
        return
    # Pixel (i, j) of cell (p, q) of the patch is channel (c, i, j) of the unshuffled image, seen at tap (1 + p, 1 + q).
    copies = rearrange(torch.eye(channels * cell * cell), "(c i j) source -> c i j source", i=cell, j=cell)
    taps = torch.zeros(2, 2, 3, 3)
    for p in range(2):
        for q in range(2):
            taps[p, q, 1 + p, 1 + q] = 1.0
    kernel = torch.einsum("c i j s, p q u v -> c p i q j s u v", copies, taps)
    convolution.weight[:pixels] = rearrange(kernel, "c p i q j s u v -> (c p i q j) s u v")
    convolution.bias[:pixels].zero_()
    embedding: Any = base.x_embedder.proj
    skip.weight.zero_()
    skip.weight[:, :pixels, 0, 0] = rearrange(embedding.weight, "d c row column -> d (c row column)")
    skip.bias.copy_(embedding.bias)
    for layer in layers:
        layer.conv2.weight.zero_()
        layer.conv2.bias.zero_()
    power = embedding.weight.square().sum(dim=(1, 2, 3)) + embedding.bias.square()
    student.encoder.norm.weight.fill_(power.mean().sqrt())
