"""Writing a model in the layout of another project, or in tokdyn's own, whole or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokdyn.attach.entry import attachment_of
from tokdyn.attach.sidecar import save
from tokdyn.checkpoints.convert import to_diffusers, to_facebook, to_official
from tokdyn.checkpoints.files import NOTES
from tokdyn.errors import CheckpointError, OutputError
from tokdyn.files import half_of, replacing, writing
from tokdyn.models import DCDiT, DiT

Layout = Literal["diffusers", "tokdyn", "official", "facebook"]
FILES = ("official", "facebook")
"""Layouts of one file; the others are folders."""
FACTS = "tokdyn.json"


@dataclass(frozen=True)
class Written:
    """What came of it.

    Attributes:
        place: the file or folder.
        files: in it, or the file itself.
        notes: what the other code computes otherwise, a sentence each.
    """

    place: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def write(
    model: DiT | DCDiT,
    place: str | Path,
    to: Layout,
    dtype: torch.dtype = torch.float32,
    facts: Mapping[str, Any] | None = None,
) -> Written:
    """Write a model so that `read` and, where it computes the same, the other project's code load it.

    Args:
        model: not changed.
        place: that is not there yet: a .safetensors file for "official" and "facebook", a folder for the others.
        to: "diffusers" for DiTTransformer2DModel.from_pretrained; "tokdyn" for `from_pretrained` of its class, with
            its methods beside it where it is wrapped; "official" for the public code of DC-DiT, "facebook" of DiT.
        dtype: of the tensors.
        facts: what is known of its training, written to tokdyn.json of a tokdyn folder.

    Returns:
        What was written.

    Raises:
        CheckpointError: that layout has no such model.
        OutputError: something is there already, or it cannot be written.
    """
    place = Path(place).expanduser()
    if place.exists():
        raise OutputError(f"{place} is there already and is not written over; choose another place.")
    if to in FILES and place.suffix != ".safetensors":
        raise OutputError(f"{place} is to be a file of the {to} layout; give it the ending .safetensors.")
    if to != "tokdyn" and attachment_of(model) is not None:
        raise CheckpointError(
            f"the {to} layout has no place for the methods that this model is wrapped with; write it with "
            "to=tokdyn, or unwrap it first."
        )
    if to == "tokdyn":
        return _own(model, place, dtype, facts)
    family, name = (DCDiT, "a DCDiT") if to == "official" else (DiT, "a DiT")
    if not isinstance(model, family):
        raise CheckpointError(f"the {to} layout is for {name}, and this is a {type(model).__name__}.")
    if isinstance(model, DCDiT):
        return _file(model, place, to_official(model), dtype, _unlike_official(model))
    if to == "facebook":
        return _file(model, place, to_facebook(model), dtype, ())
    return _diffusers(model, place, dtype)


def _own(model: DiT | DCDiT, place: Path, dtype: torch.dtype, facts: Mapping[str, Any] | None) -> Written:
    if next(model.parameters()).dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    with _folder(place) as half:
        model.save_pretrained(half)
        if attachment_of(model) is not None:
            save(model, half)
        if facts:
            (half / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Written(place, tuple(sorted(place.iterdir())))


def _file(
    model: DiT | DCDiT, place: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, notes: tuple[str, ...]
) -> Written:
    settings = {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and (value is not None or name == "sigma")
    }
    settings.pop("out_channels", None)  # follows from the others
    with replacing(place) as half:
        save_file(_cast(tensors, dtype), half, metadata={"format": "pt", NOTES: json.dumps(settings)})
    return Written(place, (place,), notes)


def _diffusers(model: DiT, place: Path, dtype: torch.dtype) -> Written:
    config = model.config
    tensors = _cast(to_diffusers(model, approximate=True), dtype)
    size = config.sample_size
    content: dict[str, Any] = {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": diffusers.__version__,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.mlp_norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": size[0] if isinstance(size, (tuple, list)) else size,
        "upcast_attention": False,
    }
    notes: tuple[str, ...] = ()
    if config.timestep_shift != 1:
        content[NOTES] = {"timestep_shift": config.timestep_shift}
        notes = ("diffusers' DiT computes slightly other timestep frequencies; tokdyn reads the folder as it was.",)
    with _folder(place) as half:
        (half / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, half / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return Written(place, tuple(sorted(place.iterdir())), notes)


def _unlike_official(model: DCDiT) -> tuple[str, ...]:
    """What the official code does whatever the settings say."""
    notes = []
    if not model.config.force_ends:
        notes.append("the official code always keeps the first and the last cell, which this model does not.")
    if model.config.sigma is None:
        notes.append("the official code always smooths when it de-chunks, which this model does not.")
    return tuple(notes)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }


@contextmanager
def _folder(place: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place if the block ends well and is removed if it does not."""
    half = half_of(place)
    try:
        with writing(place):
            shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
            half.mkdir(parents=True)
            yield half
            half.rename(place)
    finally:
        shutil.rmtree(half, ignore_errors=True)
