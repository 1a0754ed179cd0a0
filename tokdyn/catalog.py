"""The named models with their size and cost, as `tokdyn models` lists them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from tokdyn.flops import flops_per_image
from tokdyn.models import DCDiT, DiT
from tokdyn.models.sizes import SHAPES

LISTED_PATCHES = (2, 4, 8)


class CatalogSettings(BaseModel):
    """What the models are built for.

    Attributes:
        sample_size: rows and columns of the input; 32 is a 256-pixel image in an 8x latent space.
        in_channels: channels of the input.
        num_classes: classes.
        target: N of DC-DiT, cells per kept token.
        tail_drop: share of DC-DiT's kept tokens that is dropped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_size: PositiveInt = 32
    in_channels: PositiveInt = 4
    num_classes: PositiveInt = 1000
    target: float = Field(default=4.0, gt=1.0)
    tail_drop: float = Field(default=0.0, ge=0.0, lt=1.0)


@dataclass(frozen=True)
class CatalogEntry:
    """One named model.

    Attributes:
        name: as `named` takes it.
        kind: "dit" or "dcdit".
        parameters: number of parameters, the frozen position table included.
        tokens: N, cells of the token grid.
        computed: tokens that the blocks see, on average, when DC-DiT keeps what it aims at.
        gflops: 1e9 FLOPs of one forward pass on one image; a multiply-add is 2 FLOPs.
    """

    name: str
    kind: str
    parameters: int
    tokens: int
    computed: float
    gflops: float


def catalog(settings: CatalogSettings) -> list[CatalogEntry]:
    """Builds every named model without memory and computes its cost.

    Args:
        settings: what to build them for.

    Returns:
        The models; patch sizes that do not divide the input are left out.
    """
    size = settings.sample_size
    shared = {"sample_size": size, "in_channels": settings.in_channels, "num_classes": settings.num_classes}
    kept = (1.0 - settings.tail_drop) / settings.target
    entries = []
    with torch.device("meta"):
        for name in SHAPES:
            for patch in (p for p in LISTED_PATCHES if size % p == 0):
                dit = DiT.named(f"{name}/{patch}", **shared)
                cells = (size // patch) ** 2
                entries.append(_entry(f"{name}/{patch}", "dit", dit, cells, cells, flops_per_image(dit)))
            chunked = DCDiT.named(name, **shared, target=settings.target)
            cells = size**2
            entries.append(_entry(name, "dcdit", chunked, cells, kept * cells, flops_per_image(chunked, kept)))
    return entries


def _entry(name: str, kind: str, model: torch.nn.Module, cells: int, computed: float, flops: float) -> CatalogEntry:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return CatalogEntry(name, kind, parameters, cells, computed, flops / 1e9)
