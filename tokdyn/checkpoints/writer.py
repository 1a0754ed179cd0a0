"""Write a model in the layout of another project or in tokdyn's own, completely or not at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from tokdyn.attach import attachment_of, save
from tokdyn.checkpoints.convert import to_diffusers, to_facebook, to_official
from tokdyn.checkpoints.eight_bits import to_eight_bits
from tokdyn.checkpoints.files import NOTES
from tokdyn.checkpoints.formats import Layout
from tokdyn.errors import CheckpointError, OutputError
from tokdyn.files import half_of, replacing, user_path, writing
from tokdyn.models import DCDiT, DiT

FILES = ("official", "facebook")
"""Layouts that are a single file; the others are folders."""
FACTS = "tokdyn.json"


@dataclass(frozen=True)
class Written:
    """The result of `write`.

    Attributes:
        place: the file or folder.
        files: the files in the folder, or the file itself.
        notes: one sentence for each way in which the other project's code computes something else than the model.
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
    """Write a model in the layout of another project or of tokdyn. `read` loads the same model back.

    Args:
        model: the model, which is not changed.
        place: a path that does not exist yet: a .safetensors file for "official" and "facebook", otherwise a folder.
        to: "diffusers" for DiTTransformer2DModel.from_pretrained; "tokdyn" for `from_pretrained` of the model's class,
            with the attached methods beside the weights; "official" for the public code of DC-DiT; "facebook" for that
            of DiT.
        dtype: dtype of the written tensors. With torch.int8, for "tokdyn" alone, matrices are rounded to eight bits
            with a scale for each row, which `read` restores and `from_pretrained` does not.
        facts: contents of the tokdyn.json in a folder of layout "tokdyn": name, objective, data. Other layouts ignore
            them.

    Returns:
        What was written, with notes on what the other project's code computes differently.

    Raises:
        CheckpointError: the layout has no model with these settings, or cannot hold attached methods.
        OutputError: the path exists already, or cannot be written.
    """
    place = user_path(place)
    if place.exists():
        raise OutputError(f"{place} exists already and is not overwritten; choose another path.")
    if to in FILES and place.suffix != ".safetensors":
        raise OutputError(f"{place} must end in .safetensors, because the {to} layout is a file; change the ending.")
    if dtype == torch.int8 and (to != "tokdyn" or attachment_of(model) is not None):
        raise CheckpointError(
            "eight bits are for a plain model in the layout of tokdyn; write it with to=tokdyn and without methods, or "
            "in another dtype."
        )
    if to != "tokdyn" and attachment_of(model) is not None:
        raise CheckpointError(
            f"the {to} layout cannot hold the methods attached to this model; write it with to=tokdyn, or unwrap it "
            "first."
        )
    if to == "tokdyn":
        return _write_own(model, place, dtype, facts)
    family, name = (DCDiT, "a DCDiT") if to == "official" else (DiT, "a DiT")
    if not isinstance(model, family):
        raise CheckpointError(f"the {to} layout holds {name}, but this model is a {type(model).__name__}.")
    if isinstance(model, DCDiT):
        return _write_file(model, place, to_official(model), dtype, _differences_from_official(model))
    if to == "facebook":
        return _write_file(model, place, to_facebook(model), dtype, ())
    return _write_diffusers(model, place, dtype)


def _write_own(model: DiT | DCDiT, place: Path, dtype: torch.dtype, facts: Mapping[str, Any] | None) -> Written:
    """Write a folder in tokdyn's layout."""
    eight_bits = dtype == torch.int8
    if not eight_bits and next(model.parameters()).dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    with _new_folder(place) as temporary:
        if eight_bits:
            model.save_config(temporary)
            tensors = to_eight_bits(model.state_dict(), model._keep_in_fp32_modules or ())
            save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        else:
            model.save_pretrained(temporary)
        if attachment_of(model) is not None:
            save(model, temporary)
        if facts:
            (temporary / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return Written(place, tuple(sorted(place.iterdir())))


def _write_file(
    model: DiT | DCDiT, place: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, notes: tuple[str, ...]
) -> Written:
    """Write tensors to a safetensors file, with the model's settings in the header."""
    settings = {
        name: value
        for name, value in model.config.items()
        if not name.startswith("_") and (value is not None or name == "sigma")
    }
    settings.pop("out_channels", None)  # derived from the other settings
    with replacing(place) as temporary:
        save_file(_cast(tensors, dtype), temporary, metadata={"format": "pt", NOTES: json.dumps(settings)})
    return Written(place, (place,), notes)


def _write_diffusers(model: DiT, place: Path, dtype: torch.dtype) -> Written:
    """Write a folder that DiTTransformer2DModel.from_pretrained reads."""
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
        notes = ("diffusers' DiT computes slightly different timestep frequencies; tokdyn reads the original model.",)
    with _new_folder(place) as temporary:
        (temporary / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return Written(place, tuple(sorted(place.iterdir())), notes)


def _differences_from_official(model: DCDiT) -> tuple[str, ...]:
    """Return one sentence for each setting that the official code does not have and that changes the outputs."""
    notes = []
    if not model.config.force_ends:
        notes.append("the official code always keeps the first and the last cell, unlike this model.")
    if model.config.sigma is None:
        notes.append("the official code always smooths when it de-chunks, unlike this model.")
    return tuple(notes)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert the floating-point tensors to a dtype."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `place` on success and removed on failure."""
    temporary = half_of(place)
    try:
        with writing(place):
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
