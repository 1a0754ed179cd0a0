"""List named models with their size and cost, families of models, methods, and which methods work on which family."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from tokdyn.adapters import known_adapters
from tokdyn.attach import support
from tokdyn.bases import rows
from tokdyn.bases.opening import in_cache
from tokdyn.cost import flops_per_image
from tokdyn.methods import METHODS
from tokdyn.models import DCDiT, DiT
from tokdyn.models.sizes import SHAPES

LISTED_PATCHES = (2, 4, 8)


class CatalogSettings(BaseModel):
    """Settings of `tokdyn models`: what named models are built for.

    Attributes:
        sample_size: rows and columns of the input; 32 is a 256-pixel image in an 8x latent space.
        in_channels: input channels.
        num_classes: number of classes.
        target: N of DC-DiTs, cells per kept token.
        tail_drop: share of the kept tokens that DC-DiTs drop.
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
        name: name for `DiT.named` or `DCDiT.named`.
        kind: "dit" or "dcdit".
        parameters: number of parameters, including the frozen position table.
        tokens: N, cells of the token grid.
        computed: tokens that the blocks see on average when a DC-DiT keeps its target.
        gflops: 1e9 FLOPs of one forward pass on one image; a multiply-add is 2 FLOPs.
    """

    name: str
    kind: str
    parameters: int
    tokens: int
    computed: float
    gflops: float


def catalog(settings: CatalogSettings) -> list[CatalogEntry]:
    """Build every named model on the meta device and compute its cost.

    Args:
        settings: what to build the models for.

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


@dataclass(frozen=True)
class BaseEntry:
    """A pretrained model to start from.

    Attributes:
        name: name for `tokdyn.bases.open_base`.
        kind: "base".
        format: format of its file.
        objective: "noise" or "flow".
        parameters: number of parameters after reading.
        source: a URL, an id of the hub, or "shipped".
        cached: whether it can be opened without a network.
    """

    name: str
    kind: str
    format: str
    objective: str
    parameters: int
    source: str
    cached: bool


def bases() -> list[BaseEntry]:
    """List the named pretrained models."""
    return [
        BaseEntry(
            row.name,
            "base",
            row.kind,
            row.objective,
            row.parameters,
            "shipped" if row.source == "shipped" else row.place,
            in_cache(row),
        )
        for row in rows().values()
    ]


@dataclass(frozen=True)
class FamilyEntry:
    """A family of models that methods can be attached to.

    Attributes:
        name: name of its adapter.
        kind: "family".
        classes: names of its classes.
        methods: for each method, whether it works: "yes", "partly" or "no".
        refused: refused settings, as a user writes them, and the reason.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    methods: dict[str, str]
    refused: dict[str, str]


def families() -> list[FamilyEntry]:
    """List the families that have an adapter, and what works on each of them."""
    matrix = support()
    entries = []
    for adapter in known_adapters():
        found = [each for each in matrix if each.family == adapter.name]
        refused = {settings: reason for each in found for settings, reason in each.refused.items()}
        works: dict[str, str] = {each.method: each.works for each in found}
        entries.append(FamilyEntry(adapter.name, "family", adapter.classes, works, refused))
    return entries


@dataclass(frozen=True)
class MethodEntry:
    """A method.

    Attributes:
        name: name of its class.
        what: what it does, in one line.
        acts: when it acts: "training", "sampling" or both.
        stage: where it acts, from the list of all blocks down to the kernel.
        settings: its settings and their defaults.
        families: for each family, whether it works: "yes", "partly" or "no".
    """

    name: str
    what: str
    acts: tuple[str, ...]
    stage: str
    settings: dict[str, Any]
    families: dict[str, str]


def methods() -> list[MethodEntry]:
    """List all methods with the families that they work on."""
    matrix = support()
    entries = []
    for name, method in METHODS.items():
        traits = method.examples()[0].traits(depth=28)
        what = (sys.modules[method.__module__].__doc__ or "").splitlines()[0]
        acts = tuple(word for phase, word in (("train", "training"), ("sample", "sampling")) if phase in traits.phases)
        settings = {key: info.get_default(call_default_factory=True) for key, info in method.model_fields.items()}
        works: dict[str, str] = {each.family: each.works for each in matrix if each.method == name}
        entries.append(MethodEntry(name, what, acts, traits.stage.name.lower(), settings, works))
    return entries
