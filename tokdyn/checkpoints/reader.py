"""Read a checkpoint of any known format: recognise the format by the tensor names, and build the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from tokdyn.checkpoints.dydit import split_gates, wrap_with_gates
from tokdyn.checkpoints.files import Raw, find_state_dict, open_file
from tokdyn.checkpoints.fill import fill, first_few
from tokdyn.checkpoints.formats import Kind
from tokdyn.checkpoints.infer import dcdit_settings, dit_settings, input_size
from tokdyn.checkpoints.names import OFFICIAL, from_diffusers, rename, without_wrappers
from tokdyn.checkpoints.pickles import lookup
from tokdyn.checkpoints.settings import diffusers_settings, noted_settings, official_settings, own_settings, settle
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT

_TIMESTEP_MAPS: dict[Kind | None, tuple[float, float]] = {  # of time at noise level s; tokdyn passes 1000 * s
    "sit": (-0.001, 1.0),  # 1 - s
    "repa": (0.001, 0.0),  # s
}
_REPA_ONLY = "projectors."  # of hidden states to features, used in training only


def read(
    source: str | Path | Mapping[str, Any], kind: Kind | None = None, *, ema: bool = True, **config: Any
) -> DiT | DCDiT:
    """Load a checkpoint of any known format. Most settings of the model are inferred from the shapes of the tensors.

    Args:
        source: a file or folder (safetensors, sharded safetensors, torch, diffusers, tokdyn), or a state dict. A state
            dict may be nested, {"ema": ..., "model": ...}, and its names may have the prefixes of DataParallel,
            torch.compile and FSDP.
        kind: the format; None recognises it. SiT (arXiv 2401.08740) is not recognised, because its tensors have the
            names of DiT's: set "sit", or "repa" for the SiT of REPA (arXiv 2410.06940), which is recognised if it has
            its projectors. Both become a `DiT` for the flow objective. Time runs from 0 (noise) to 1 (image) in "sit",
            whose prediction is image - noise, and from 1 to 0 in "repa", whose prediction is noise - image; both are
            converted.
        ema: take the averaged weights if a checkpoint holds averaged and plain ones.
        **config: settings that the weights do not determine: `num_heads` (known for widths 384, 768, 1024 and 1152);
            `sample_size` (if there is no position table, or the grid is not square and the table is not sine-cosine);
            `sigma` (default 1.0; 2.0 for official weights with 64x64 tokens or more, as published); `patch_size` of a
            DC-DiT (default 1); `target` of a DyDiT, the share of the FLOPs that it was trained to use (default 0.7).
            With `timestep_shift=0, mlp_norm_eps=1e-6`, diffusers' weights compute as in facebook's DiT, from which they
            were converted.

    Returns:
        The model, in evaluation mode, in fp32, on the CPU. Official DC-DiT weights get force_ends=True, with which they
        were trained. A DyDiT is a `DiT` wrapped with `DynamicWidth`.

    Raises:
        CheckpointError: the source cannot be read, is of an unknown format, is incomplete, or contradicts `config`.
    """
    if not isinstance(source, (str, Path, Mapping)):
        raise CheckpointError(f"the source is a {type(source).__name__}; expected a path or a state dict.")
    raw = find_state_dict(source, ema) if isinstance(source, Mapping) else open_file(source, ema)
    tensors = without_wrappers(raw.tensors, raw.origin)
    if any(name.startswith(_REPA_ONLY) for name in tensors):
        if kind == "sit":
            raise CheckpointError(
                f"{raw.origin} has the projectors of REPA, whose time runs the other way than SiT's; remove kind."
            )
        tensors = {name: value for name, value in tensors.items() if not name.startswith(_REPA_ONLY)}
        kind = "repa" if kind is None else kind
    found = recognise(tensors, raw.origin)
    if kind is not None and kind not in get_args(Kind):
        raise CheckpointError(f"kind={kind!r} is unknown; expected one of {', '.join(get_args(Kind))}.")
    own = raw.config.get("_class_name") in ("DiT", "DCDiT")
    path_words = re.split(r"[^a-z]+", "/".join(Path(raw.origin).parts[-2:]).lower())
    if kind is None and found == "dit" and {"sit", "repa"}.intersection(path_words) and not (own or raw.notes):
        raise CheckpointError(
            f"{raw.origin} may be SiT, REPA's SiT or DiT, whose tensors have the same names; set kind to 'sit', 'repa' "
            "or 'dit'."
        )
    if kind not in (None, found) and not (found == "dit" and kind in ("sit", "repa", "tokdyn")):
        raise CheckpointError(
            f"{raw.origin} has the tensors of kind {found!r} and cannot be read as kind={kind!r}; remove kind."
        )
    if kind in _TIMESTEP_MAPS and own:
        raise CheckpointError(f"{raw.origin} was written by tokdyn, so kind={kind!r} is not needed; remove kind.")
    if found == "diffusers":
        return _read_dit(from_diffusers(tensors, raw.origin), diffusers_settings(raw), config, raw.origin)
    family = DCDiT if found in ("dc-dit", "tokdyn") else DiT
    stored = own_settings(raw) if own else noted_settings(family, raw.notes, raw.origin)
    if kind == "sit":
        tensors = {name: -value if name.startswith("final_layer.linear.") else value for name, value in tensors.items()}
    if kind in _TIMESTEP_MAPS:
        stored = {**stored, "timestep_map": _TIMESTEP_MAPS[kind]}
    if found == "dydit":
        return _read_dydit(tensors, stored, config, raw)
    if found == "dit":
        return _read_dit(tensors, stored, config, raw.origin)
    if found == "dc-dit":
        tensors = {rename(name, OFFICIAL): tensor for name, tensor in tensors.items()}
        stored = {**official_settings(raw), **stored}
    return _read_dcdit(tensors, stored, config, raw.origin, official=found == "dc-dit")


def recognise(tensors: Mapping[str, Tensor], origin: str = "the state dict") -> Kind:
    """Recognise the format of a checkpoint by its tensor names.

    Returns:
        The format; "dit" for DiT, SiT and REPA.

    Raises:
        CheckpointError: no known format has these names.
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
        f"{origin} is of an unknown format: its tensors are {first_few(sorted(tensors))}. Known are official DC-DiT "
        "(hnet.*), facebook's DiT (blocks.*.attn.qkv), DyDiT (blocks.*.attn_rate), diffusers' DiT "
        "(transformer_blocks.*.norm1.emb.class_embedder) and tokdyn's own."
    )


def _read_dit(tensors: dict[str, Tensor], stored: Mapping[str, Any], config: Mapping[str, Any], origin: str) -> DiT:
    """Build a `DiT` from tensors by tokdyn's names, settings stored with them, and settings of the caller."""
    settings = settle(DiT, dit_settings(tensors, origin), stored, config, origin)
    settings["sample_size"] = input_size(tensors, settings["patch_size"], settings.get("sample_size"), origin)
    model: DiT = fill(DiT, settings, tensors, origin)
    return model


def _read_dydit(tensors: dict[str, Tensor], stored: Mapping[str, Any], config: Mapping[str, Any], raw: Raw) -> DiT:
    """Build a `DiT` with `DynamicWidth` from the tensors of a DyDiT; other arguments as for `_read_dit`."""
    plain, gates = split_gates(tensors)
    target = config.get("target", lookup(raw.training, "token_ratio") or 0.7)
    model = _read_dit(plain, stored, {name: value for name, value in config.items() if name != "target"}, raw.origin)
    return wrap_with_gates(model, gates, target, raw.origin)


def _read_dcdit(
    tensors: dict[str, Tensor], stored: Mapping[str, Any], config: Mapping[str, Any], origin: str, official: bool
) -> DCDiT:
    """Build a `DCDiT` from tensors by tokdyn's names; other arguments as for `_read_dit`."""
    patch = config.get("patch_size", stored.get("patch_size", 1))
    settings = settle(DCDiT, dcdit_settings(tensors, origin, patch), stored, config, origin)
    settings["sample_size"] = size = input_size(tensors, patch, settings.get("sample_size"), origin)
    if official and "sigma" not in settings:
        settings["sigma"] = 2.0 if size[0] * size[1] >= 64 * 64 * patch * patch else 1.0
    model: DCDiT = fill(DCDiT, settings, tensors, origin)
    return model
