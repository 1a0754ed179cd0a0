"""List the pretrained models that can be opened by name, with their formats, objectives and sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokdyn import models
from tokdyn.files import json_object

if TYPE_CHECKING:
    from torch import nn

    from tokdyn.checkpoints import Kind

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<inside>[^:]+))?")
"""OWNER/REPO or OWNER/REPO:FILE_OR_FOLDER."""
INDEX = "model_index.json"
"""The file of a pipeline of diffusers that lists its components."""
Objective = Literal["noise", "flow"]
Source = Literal["url", "hub", "shipped"]
"""Where a base is: at a public URL, in a repository of the Hugging Face hub, or in a folder of this package."""


@dataclass(frozen=True)
class Row:
    """A base that can be opened by name.

    Attributes:
        name: the name that users write.
        kind: format of the checkpoint.
        objective: what the model was trained to predict: "noise", or the velocity of a "flow".
        source: whether `place` is a "url", a "hub" id, or a folder that is "shipped" with the package.
        place: a URL, a hub id OWNER/REPO or OWNER/REPO:FILE_OR_FOLDER, or the name of a folder in the package.
        build: builds the model with new weights.
        file: name that a file from a URL gets in the cache.
        sha256: published digest of a file from a URL; None accepts any file on the first download.
    """

    name: str
    kind: Kind
    objective: Objective
    source: Source
    place: str
    build: Callable[[], nn.Module]
    file: str = ""
    sha256: str | None = None

    @property
    def parameters(self) -> int:
        """The number of parameters, the frozen position table and gates included."""
        import torch

        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.build().parameters())


def _dit(size: int = 32) -> Callable[[], nn.Module]:
    """Return a function that builds DiT-XL/2 for latents of size x size pixels."""
    return lambda: models.DiT.named("XL/2", sample_size=size)


def _dc_dit(name: str) -> Callable[[], nn.Module]:
    """Return a function that builds the DC-DiT of a named size."""
    return lambda: models.DCDiT.named(name)


def _dydit() -> nn.Module:
    """Build DiT-XL/2 with the gates of `DynamicWidth`."""
    from torch import nn

    from tokdyn.methods import DynamicWidth
    from tokdyn.methods.base import Sizes

    model = models.DiT.named("XL/2")
    width, heads = model.config.hidden_size, model.config.num_heads
    gates = DynamicWidth(token_input="stream", embedding=width).build(Sizes(width, heads, (0,) * model.config.depth))
    assert gates is not None
    return nn.ModuleList([model, gates])


_FACEBOOK = "https://dl.fbaipublicfiles.com/DiT/models"
_SIT = "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
_AMD = "amd/DynamicChunkingDiT"
_DYDIT = "heisejiasuo/DyDiT:new_release_2025_03_26"
_PUBLISHED = (
    Row("DiT-XL/2", "dit", "noise", "url", f"{_FACEBOOK}/DiT-XL-2-256x256.pt", _dit(), "DiT-XL-2-256x256.pt"),
    Row("DiT-XL/2-512", "dit", "noise", "url", f"{_FACEBOOK}/DiT-XL-2-512x512.pt", _dit(64), "DiT-XL-2-512x512.pt"),
    Row(
        "SiT-XL/2", "sit", "flow", "url", f"{_SIT}?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0", _dit(), "SiT-XL-2-256x256.pt"
    ),
    Row("DC-DiT-S", "dc-dit", "noise", "hub", f"{_AMD}:S-256", _dc_dit("S")),
    Row("DC-DiT-XL", "dc-dit", "noise", "hub", f"{_AMD}:XL-256", _dc_dit("XL")),
    Row("DyDiT-XL/2-0.7", "dydit", "noise", "hub", f"{_DYDIT}/new_dydit0.7.pt", _dydit),
    Row("DyDiT-XL/2-0.5", "dydit", "noise", "hub", f"{_DYDIT}/new_dydit0.5.pt", _dydit),
    Row("facebook/DiT-XL-2-256", "diffusers", "noise", "hub", "facebook/DiT-XL-2-256:transformer", _dit()),
    Row("facebook/DiT-XL-2-512", "diffusers", "noise", "hub", "facebook/DiT-XL-2-512:transformer", _dit(64)),
)
SHIPPED = ("shapes", "shapes/dit", "shapes/dc-dit")
"""Bases that ship with the package, by the name of their folder in it; an installation may lack some."""
TARGETS = {"DyDiT-XL/2-0.7": 0.7, "DyDiT-XL/2-0.5": 0.5}
"""Shares of the FLOPs that the DyDiTs were trained to use, which their checkpoints do not record."""


def rows() -> dict[str, Row]:
    """Return all listed bases by name. Shipped ones are listed if they are installed."""
    shipped = [_shipped(name) for name in SHIPPED if (shipped_folder(name) / "config.json").is_file()]
    return {row.name: row for row in (*shipped, *_PUBLISHED)}


def shipped_folder(name: str) -> Path:
    """Return the path of a shipped base, whether it is installed or not."""
    return Path(str(files("tokdyn.bases") / name))


def _shipped(name: str) -> Row:
    """Return the row of a shipped base, from the files in its folder."""
    folder = shipped_folder(name)
    config = json_object(folder / "config.json")
    facts = json_object(folder / "tokdyn.json") if (folder / "tokdyn.json").is_file() else {}
    objective: Objective = "flow" if facts.get("objective", {}).get("kind") == "flow" else "noise"
    return Row(
        name, "tokdyn", objective, "shipped", name, lambda: getattr(models, config["_class_name"]).from_config(config)
    )
