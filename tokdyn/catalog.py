"""List named models with their sizes and costs, pretrained models, families, methods, presets, and what works on what.

All of it but the caches is the same on every machine. It ships in catalog.json, so that it is listed without torch;
`python tests/catalog_file.py` writes that file anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from tokdyn.presets import PresetRow

if TYPE_CHECKING:  # everything is imported where it is used, so that the settings can be checked before torch is loaded
    from torch import nn

LISTED_PATCHES = (2, 4, 8)


class CatalogSettings(BaseModel):
    """Settings of `tokdyn models`: the inputs that sizes and costs of named models are computed for.

    Attributes:
        sample_size: rows and columns of the input; 32 stands for a 256-pixel image in an 8x latent space.
        in_channels: number of input channels.
        num_classes: number of classes.
        target: N, cells per kept token of a DC-DiT.
        tail_drop: share of the kept tokens that a DC-DiT drops as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_size: PositiveInt = 32
    in_channels: PositiveInt = 4
    num_classes: PositiveInt = 1000
    target: float = Field(default=4.0, gt=1.0)
    tail_drop: float = Field(default=0.0, ge=0.0, lt=1.0)


@dataclass(frozen=True)
class CatalogEntry:
    """The size and cost of one named model.

    Attributes:
        name: its name for `DiT.named` or `DCDiT.named`, and on the command line.
        kind: "dit" or "dcdit".
        parameters: number of parameters, including the frozen position table.
        tokens: N, cells of the token grid.
        computed: mean number of tokens that the blocks get; fewer than N in a DC-DiT, which keeps 1/target of them.
        gflops: GFLOPs (1e9) of one forward pass on one image; a multiply-add is 2 FLOPs.
    """

    name: str
    kind: str
    parameters: int
    tokens: int
    computed: float
    gflops: float


def catalog(settings: CatalogSettings) -> list[CatalogEntry]:
    """Compute size and cost of every named model, without allocating its weights.

    Args:
        settings: the inputs to compute them for.

    Returns:
        An entry for each model and patch size; patch sizes that do not divide the input are left out.
    """
    import torch

    from tokdyn.cost import flops_per_image
    from tokdyn.models import DCDiT, DiT
    from tokdyn.models.sizes import SHAPES

    size = settings.sample_size
    shared = {"sample_size": size, "in_channels": settings.in_channels, "num_classes": settings.num_classes}
    kept = (1.0 - settings.tail_drop) / settings.target
    entries = []
    with torch.device("meta"):
        for name in SHAPES:
            for patch in (p for p in LISTED_PATCHES if size % p == 0):
                dit = DiT.named(f"{name}/{patch}", **shared)
                cells = (size // patch) ** 2
                entries.append(_entry(f"DiT-{name}/{patch}", "dit", dit, cells, cells, flops_per_image(dit)))
            chunked = DCDiT.named(name, **shared, target=settings.target)
            cells = size**2
            entries.append(
                _entry(f"DC-DiT-{name}", "dcdit", chunked, cells, kept * cells, flops_per_image(chunked, kept))
            )
    return entries


def _entry(name: str, kind: str, model: nn.Module, cells: int, computed: float, flops: float) -> CatalogEntry:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return CatalogEntry(name, kind, parameters, cells, computed, flops / 1e9)


@dataclass(frozen=True)
class BaseEntry:
    """A pretrained model to start from.

    Attributes:
        name: its name for `tokdyn.bases.open_base`.
        kind: "base".
        format: the format of its file.
        objective: what it predicts, "noise" or "flow".
        parameters: number of parameters of the model that is built from it.
        source: a URL, a hub id, or "shipped" for a file of this package.
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
    """Return an entry for each named pretrained model."""
    from tokdyn.bases.locating import in_cache
    from tokdyn.bases.table import rows

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
        name: the name of its adapter.
        kind: "family".
        classes: the names of its model classes.
        methods: for each method whether it can be attached: "yes", "partly" (with some settings) or "no".
        refused: settings that cannot be attached, as the Python call that makes them, each with the reason.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    methods: dict[str, str]
    refused: dict[str, str]


def families() -> list[FamilyEntry]:
    """Return an entry for each family with an adapter."""
    from tokdyn.adapters import known_adapters
    from tokdyn.attach import support

    matrix = support()
    entries = []
    for adapter in known_adapters():
        row = [one for one in matrix if one.family == adapter.name]
        refused = {settings: reason for one in row for settings, reason in one.refused.items()}
        works: dict[str, str] = {one.method: one.works for one in row}
        entries.append(FamilyEntry(adapter.name, "family", adapter.classes, works, refused))
    return entries


@dataclass(frozen=True)
class ClassEntry:
    """A transformer class of diffusers without an adapter.

    Attributes:
        name: of the class.
        kind: "class".
        methods: for each method whether it can be attached, with an inferred adapter: "yes" or "no".
        reason: why the others cannot.
    """

    name: str
    kind: str
    methods: dict[str, str]
    reason: str


def classes() -> list[ClassEntry]:
    """Return an entry for each transformer class of diffusers that no adapter is declared for."""
    from tokdyn.adapters.undeclared import undeclared
    from tokdyn.methods import METHODS

    return [
        ClassEntry(name, "class", {method: "yes" if method in one.methods else "no" for method in METHODS}, one.reason)
        for name, one in undeclared().items()
    ]


@dataclass(frozen=True)
class MethodEntry:
    """A method, its settings and the families that it works on.

    Attributes:
        name: the name of its class.
        what: what it does, in one line.
        acts: when it acts: "training", "sampling" or both.
        stage: where it acts: "blocks", "span", "block", "sublayer" or "kernel".
        settings: the defaults of its settings by name.
        families: for each family whether it can be attached: "yes", "partly" (with some settings) or "no".
    """

    name: str
    what: str
    acts: tuple[str, ...]
    stage: str
    settings: dict[str, Any]
    families: dict[str, str]


def methods() -> list[MethodEntry]:
    """Return an entry for each registered method."""
    from tokdyn.attach import support
    from tokdyn.methods import METHODS

    matrix = support()
    entries = []
    for name, method in METHODS.items():
        traits = method.examples()[0].traits(depth=28)
        what = (sys.modules[method.__module__].__doc__ or "").splitlines()[0]
        acts = tuple(word for phase, word in (("train", "training"), ("sample", "sampling")) if phase in traits.phases)
        settings = {key: info.get_default(call_default_factory=True) for key, info in method.model_fields.items()}
        works: dict[str, str] = {one.family: one.works for one in matrix if one.method == name}
        entries.append(MethodEntry(name, what, acts, traits.stage.name.lower(), settings, works))
    return entries


SHIPPED = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True)
class Catalog:
    """Everything that `tokdyn models`, `tokdyn methods` and `tokdyn presets` list.

    Attributes:
        sizes: the named models, with the default settings.
        bases: the pretrained models.
        families: the families with an adapter.
        classes: the classes of diffusers without one.
        methods: the methods of this package.
        explained: by the name of a method, the meaning, type and default of each of its settings.
        presets: the published settings of methods for named models.
    """

    sizes: tuple[CatalogEntry, ...]
    bases: tuple[BaseEntry, ...]
    families: tuple[FamilyEntry, ...]
    classes: tuple[ClassEntry, ...]
    methods: tuple[MethodEntry, ...]
    explained: dict[str, dict[str, str]] = field(default_factory=dict)
    presets: tuple[PresetRow, ...] = ()


def computed(explained: Mapping[str, Mapping[str, str]]) -> Catalog:
    """Compute the catalog from the code, with given explanations of settings; it loads torch and diffusers."""
    from tokdyn.presets import listed

    return Catalog(
        sizes=tuple(catalog(CatalogSettings())),
        bases=tuple(bases()),
        families=tuple(families()),
        classes=tuple(classes()),
        methods=tuple(methods()),
        explained={name: dict(rows) for name, rows in explained.items()},
        presets=tuple(listed()),
    )


def to_json(known: Catalog) -> str:
    """Write a catalog as the text of catalog.json. What is in the caches of this machine is left out."""
    plain = replace(known, bases=tuple(replace(each, cached=False) for each in known.bases))
    return json.dumps(asdict(plain), indent=1) + "\n"


def stored() -> Catalog:
    """Read the catalog that ships with the package; no pretrained model is said to be in the caches."""
    content = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return Catalog(
        sizes=tuple(CatalogEntry(**each) for each in content["sizes"]),
        bases=tuple(BaseEntry(**each) for each in content["bases"]),
        families=tuple(FamilyEntry(**{**each, "classes": tuple(each["classes"])}) for each in content["families"]),
        classes=tuple(ClassEntry(**each) for each in content["classes"]),
        methods=tuple(MethodEntry(**{**each, "acts": tuple(each["acts"])}) for each in content["methods"]),
        explained=content["explained"],
        presets=tuple(PresetRow(**{**each, "names": tuple(each["names"])}) for each in content["presets"]),
    )


def shipped() -> Catalog:
    """Read the catalog that ships with the package, and look up which pretrained models are in the caches."""
    from tokdyn.bases.locating import in_cache
    from tokdyn.bases.table import rows

    found, known = stored(), rows()
    present = (each for each in found.bases if each.name in known)
    return replace(found, bases=tuple(replace(each, cached=in_cache(known[each.name])) for each in present))
