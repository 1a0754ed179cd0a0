"""Recognising a checkpoint by its names and building the model that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from tokdyn.checkpoints.files import Raw, choose, open_file
from tokdyn.checkpoints.fill import fill, some
from tokdyn.checkpoints.infer import dcdit_settings, dit_settings, grid_size
from tokdyn.checkpoints.names import OFFICIAL, from_diffusers, renamed, unwrapped
from tokdyn.checkpoints.settings import diffusers_settings, noted, official_settings, own_settings, settle
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT

Kind = Literal["dc-dit", "dit", "sit", "dydit", "diffusers", "tokdyn"]
"""Formats: official DC-DiT, facebook DiT, SiT (facebook's names, to be told), DyDiT, diffusers DiT, tokdyn's own."""
_SIT_CLOCK = (-0.001, 1.0)  # SiT's time is 1 - s at the image's share of noise s, of which tokdyn tells 1000 s


def read(
    source: str | Path | Mapping[str, Any], kind: Kind | None = None, *, ema: bool = True, **config: Any
) -> DiT | DCDiT:
    """Load a checkpoint of any known format; sizes come from the shapes of the tensors.

    Args:
        source: a file or folder (safetensors, sharded safetensors, torch, diffusers, tokdyn), or a state dict, which
            may be wrapped in {"ema": ..., "model": ...} as in training files and may carry the prefixes of
            DataParallel, torch.compile and FSDP.
        kind: None recognises the format. SiT (arXiv 2401.08740) must be told as "sit": its names are DiT's, but its
            time runs from 0, noise, to 1, and it predicts image - noise. It becomes a `DiT` for the flow objective.
        ema: take the averaged weights where a checkpoint holds both.
        **config: settings of the model that the weights leave open: `num_heads` (known for widths 384, 768, 1024 and
            1152), `sample_size` (where there is no position table or its grid is not square), `sigma`
            (default 1.0, and 2.0 for official weights from 64x64 tokens on, as published), `patch_size` of a DC-DiT
            (default 1), `target` of a DyDiT (the share of the FLOPs that it was trained to, which no tensor says;
            default 0.7). `timestep_shift=0, mlp_norm_eps=1e-6` gives diffusers' weights the function of facebook's DiT,
            which they were converted from.

    Returns:
        The model in evaluation mode, fp32, on the CPU. Official DC-DiT weights come with force_ends=True, as they
        were trained. A DyDiT is a `DiT` wrapped with `DynamicWidth`.

    Raises:
        CheckpointError: the source cannot be read, is of no known format, is incomplete, or contradicts `config`.
    """
    if not isinstance(source, (str, Path, Mapping)):
        raise CheckpointError(f"the source is a {type(source).__name__}; expected a path or a state dict.")
    raw = choose(source, ema) if isinstance(source, Mapping) else open_file(source, ema)
    tensors = unwrapped(raw.tensors, raw.origin)
    found = recognise(tensors, raw.origin)
    if kind is not None and kind not in get_args(Kind):
        raise CheckpointError(f"kind={kind!r} is unknown; expected one of {', '.join(get_args(Kind))}.")
    own = raw.config.get("_class_name") in ("DiT", "DCDiT")
    named = re.split(r"[^a-z]+", "/".join(Path(raw.origin).parts[-2:]).lower())
    if kind is None and found == "dit" and "sit" in named and not (own or raw.notes):
        raise CheckpointError(f"{raw.origin} may be SiT or DiT, whose tensors have the same names; give kind=.")
    if kind not in (None, found) and not (found == "dit" and kind in ("sit", "tokdyn")):
        raise CheckpointError(f"{raw.origin} was to be read as {kind!r}, but its tensors are those of {found!r}.")
    if kind == "sit" and own:
        raise CheckpointError(f"{raw.origin} was written by tokdyn, which knows its time already; leave kind out.")
    if found == "diffusers":
        return _read_dit(from_diffusers(tensors, raw.origin), diffusers_settings(raw), config, raw.origin)
    family = DCDiT if found in ("dc-dit", "tokdyn") else DiT
    family = DCDiT if found in ("dc-dit", "tokdyn") else DiT
    stored = own_settings(raw) if own else noted(family, raw.notes, raw.origin)
    if kind == "sit":
        tensors = {name: -value if name.startswith("final_layer.linear.") else value for name, value in tensors.items()}
        stored = {**stored, "timestep_map": _SIT_CLOCK}
    if found == "dydit":
        return _read_dydit(tensors, stored, config, raw)
    if found == "dit":
        return _read_dit(tensors, stored, config, raw.origin)
    if found == "dc-dit":
        tensors = {renamed(name, OFFICIAL): tensor for name, tensor in tensors.items()}
        stored = {**official_settings(raw), **stored}
    return _read_dcdit(tensors, stored, config, raw.origin, official=found == "dc-dit")


def recognise(tensors: Mapping[str, Tensor], origin: str = "the state dict") -> Kind:
    """The format that the names belong to ("dit" for both DiT and SiT).

    Raises:
        CheckpointError: none of the known ones.
    """
    if any(name.startswith("blocks.") and ".attn_rate." in name for name in tensors):
        return "dydit"
    if any(name.startswith("hnet.") for name in tensors):
        return "dc-dit"
    if any(name.startswith("transformer_blocks.") and ".class_embedder." in name for name in tensors):
        return "diffusers"
    if any(name.startswith("chunking.") for name in tensors):
        return "tokdyn"
    if any(name.startswith("blocks.") and ".attn.qkv." in name for name in tensors):
        return "dit"
    raise CheckpointError(
        f"{origin} is of no known format: it has {some(sorted(tensors))}. Known are official DC-DiT (hnet.*), facebook "
        "DiT (blocks.*.attn.qkv), DyDiT (blocks.*.attn_rate), diffusers DiT "
        "(transformer_blocks.*.norm1.emb.class_embedder) and tokdyn's own."
    )


def _read_dit(tensors: dict[str, Tensor], stored: Mapping[str, Any], config: Mapping[str, Any], origin: str) -> DiT:
    settings = settle(DiT, dit_settings(tensors, origin), stored, config, origin)
    settings["sample_size"] = grid_size(tensors, settings["patch_size"], settings.get("sample_size"), origin)
    model: DiT = fill(DiT, settings, tensors, origin)
    return model


def _read_dydit(tensors: dict[str, Tensor], stored: Mapping[str, Any], config: Mapping[str, Any], raw: Raw) -> DiT:
    from tokdyn.checkpoints.dydit import parted, with_gates

    plain, gates = parted(tensors)
    target = config.get("target", raw.training.lookup("token_ratio") or 0.7)
    model = _read_dit(plain, stored, {name: value for name, value in config.items() if name != "target"}, raw.origin)
    return with_gates(model, gates, target, raw.origin)


def _read_dcdit(
    tensors: dict[str, Tensor], stored: Mapping[str, Any], config: Mapping[str, Any], origin: str, official: bool
) -> DCDiT:
    patch = config.get("patch_size", stored.get("patch_size", 1))
    settings = settle(DCDiT, dcdit_settings(tensors, origin, patch), stored, config, origin)
    settings["sample_size"] = size = grid_size(tensors, patch, settings.get("sample_size"), origin)
    if official and "sigma" not in settings:
        settings["sigma"] = 2.0 if size[0] * size[1] >= 64 * 64 * patch * patch else 1.0
    model: DCDiT = fill(DCDiT, settings, tensors, origin)
    return model
