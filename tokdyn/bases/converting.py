"""From any base to a file or folder in another layout."""

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
    """What to convert and to what.

    Attributes:
        source: A checkpoint file or folder, a name of `tokdyn models`, or OWNER/REPO[:FILE_OR_FOLDER] of the hub.
        destination: A folder that is not there yet, or a .safetensors file for `official` and `facebook`.
        to: The layout: a folder for diffusers' DiTTransformer2DModel, one of tokdyn's own, or a file for the public
            code of DC-DiT (`official`) or DiT (`facebook`).
        kind: The format of the source; null recognises it. SiT has the tensors of DiT and has to be told.
        dtype: Of the tensors that are written.
        ema: Take the averaged weights where the source has both.
        num_heads: Attention heads, where neither the width nor the source tells.
        sample_size: Rows and columns of the input, where the source does not tell.
        patch_size: Of a DC-DiT whose source does not tell; null means 1.
        timestep_shift: 0 gives diffusers' weights the timestep frequencies of facebook's DiT, 1 those of diffusers.
        mlp_norm_eps: Epsilon of the norm before the MLP; 1e-6 in facebook's DiT, 1e-5 in diffusers'.
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
    """What was written.

    Attributes:
        source: as it was given.
        sha256: of its weights.
        place: the file or folder.
        layout: of it.
        files: in it, or the file itself.
        model: name of the class.
        parameters: number of them.
        methods: names of those that the model is wrapped with.
        objective: what the model was trained to predict.
        notes: what the other code computes otherwise.
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
        CheckpointError: the source cannot be read, or the layout has no such model.
        OutputError: something is at the destination already, or it cannot be written.
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
    """What tokdyn.json of a tokdyn folder says: what the source says, else what is known of it."""
    if base.facts or (base.origin not in rows() and base.objective == "noise"):  # of a file, noise is a guess
        return base.facts
    objective: dict[str, Any] = {"kind": base.objective}
    if base.objective == "noise":
        objective["learn_sigma"] = base.model.config.learn_sigma
    return {"name": base.origin, "objective": objective, "source": {"base": base.origin, "sha256": base.sha256}}
