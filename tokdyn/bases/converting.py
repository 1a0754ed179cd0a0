"""Convert a pretrained model to the layout of another project or of tokdyn (`tokdyn convert`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from tokdyn.attach import attachment_of
from tokdyn.bases.opening import Base, read_base
from tokdyn.bases.table import Objective, rows
from tokdyn.checkpoints import Kind
from tokdyn.checkpoints.writer import Layout, write
from tokdyn.files import UserPath

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ConvertConfig(BaseModel):
    """Settings of `tokdyn convert`.

    Attributes:
        source: A checkpoint file or folder, a name of `tokdyn models`, or OWNER/REPO[:FILE_OR_FOLDER] of the hub.
        destination: A path that does not exist yet: a .safetensors file for `official` and `facebook`, otherwise a
            folder.
        to: The layout: a folder for diffusers' DiTTransformer2DModel (`diffusers`) or for tokdyn (`tokdyn`), or a file
            for the public code of DC-DiT (`official`) or DiT (`facebook`).
        kind: The format of the source; null recognises it. For SiT, set `sit`, and for the SiT of REPA `repa`, because
            their tensors have the names of DiT's.
        dtype: Dtype of the written tensors.
        ema: Take the averaged weights if the source holds averaged and plain ones.
        num_heads: Number of attention heads, if neither the width nor the source determines it.
        sample_size: Input size in pixels or latent pixels, one number or (rows, columns), if the source does not
            determine it.
        patch_size: Patch size of a DC-DiT whose source does not determine it; null takes 1.
        timestep_shift: Timestep frequencies to read diffusers' weights with: 0 for facebook's, 1 for diffusers' own.
        mlp_norm_eps: Epsilon of the norm before the MLP: 1e-6 in facebook's DiT, 1e-5 in diffusers'.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1)
    destination: UserPath
    to: Layout
    kind: Kind | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: bool = True
    num_heads: int | None = Field(default=None, ge=1)
    sample_size: int | tuple[int, int] | None = None
    patch_size: int | None = Field(default=None, ge=1)
    timestep_shift: int | None = Field(default=None, ge=0, le=1)
    mlp_norm_eps: float | None = Field(default=None, gt=0.0)


@dataclass(frozen=True)
class Converted:
    """The result of `convert`.

    Attributes:
        source: the source as the user gave it.
        sha256: digest of the source's weights.
        place: the file or folder that was written.
        layout: layout of the written model.
        files: the files in the folder, or the file itself.
        model: class name of the model.
        parameters: number of parameters.
        methods: class names of the methods attached to the model.
        objective: what the model was trained to predict: "noise", or the velocity of a "flow".
        notes: one sentence for each way in which the other project's code computes something else than the model.
    """

    source: str
    sha256: str
    place: Path
    layout: Layout
    files: tuple[Path, ...]
    model: str
    parameters: int
    methods: tuple[str, ...]
    objective: Objective
    notes: tuple[str, ...]


def convert(config: ConvertConfig) -> Converted:
    """Read a base and write it in another layout.

    Raises:
        CheckpointError: the source cannot be read, or the layout cannot hold the model.
        OutputError: the destination exists already, or cannot be written.
    """
    names = ("num_heads", "sample_size", "patch_size", "timestep_shift", "mlp_norm_eps")
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    base = read_base(config.source, config.kind, config.ema, **given)
    written = write(base.model, config.destination, config.to, DTYPES[config.dtype], _facts(base))
    attachment = attachment_of(base.model)
    return Converted(
        source=config.source,
        sha256=base.sha256,
        place=written.place,
        layout=config.to,
        files=written.files,
        model=type(base.model).__name__,
        parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        methods=() if attachment is None else tuple(type(each).__name__ for each in attachment.methods),
        objective=base.objective,
        notes=written.notes,
    )


def _facts(base: Base) -> dict[str, Any]:
    """Return the contents of the tokdyn.json to write: those of the source, or if it has none, name and objective."""
    if base.facts or (base.origin not in rows() and base.objective == "noise"):  # of a bare file, "noise" is a guess
        return base.facts
    objective: dict[str, Any] = {"kind": base.objective}
    if base.objective == "noise":
        objective["learn_sigma"] = base.model.config.learn_sigma
    return {"name": base.origin, "objective": objective, "source": {"base": base.origin, "sha256": base.sha256}}
