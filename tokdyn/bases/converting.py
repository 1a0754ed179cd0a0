"""Convert a pretrained model to the layout of another project or of tokdyn (`tokdyn convert`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokdyn.attach import attachment_of
from tokdyn.bases.convert_config import ConvertConfig
from tokdyn.bases.opening import Base, read_base
from tokdyn.bases.table import Objective, rows
from tokdyn.checkpoints.formats import Layout
from tokdyn.checkpoints.writer import write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


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
