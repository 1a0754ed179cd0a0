"""The settings of `tokdyn report` and `tokdyn plot`, checked by pydantic; unknown keys are refused.

Each field describes itself, because both commands share most of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from tokdyn.diffusion.settings import GuidanceScale, SchedulerName, Share
from tokdyn.files import UserPath
from tokdyn.section import Section, listed


def _page(path: Path) -> Path:
    """Reject a page that is not called .html, which no browser would show."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path} does not end in .html: name the page that is to be written, such as report.html")
    return path


def _different(drops: tuple[float, ...]) -> tuple[float, ...]:
    """Sort tail drops, and reject equal ones."""
    if len(set(drops)) < len(drops):
        raise ValueError("a tail drop is listed twice: remove one of the two")
    return tuple(sorted(drops))


Drops = Annotated[tuple[Share, ...], AfterValidator(_different), BeforeValidator(listed), Field(min_length=1)]
Formats = Annotated[tuple[Literal["png", "svg", "pdf"], ...], BeforeValidator(listed), Field(min_length=1)]


class Drawing(Section):
    """What is sampled for a report or for figures."""

    count: Annotated[
        int, Field(ge=1, le=1000, description="Images per run and budget, from the same seeds in each.")
    ] = 24
    seed: Annotated[int, Field(ge=0, description="The noise of image i has the seed `seed` + i.")] = 0
    batch_size: Annotated[PositiveInt, Field(description="Images per model call, before guidance doubles it.")] = 64
    scheduler: Annotated[
        SchedulerName | None,
        Field(
            description="`ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null takes ddim or euler."
        ),
    ] = None
    steps: Annotated[int, Field(ge=2, le=1000, description="Sampling steps per image.")] = 25
    guidance: Annotated[GuidanceScale, Field(description="Scale of classifier-free guidance; 1 turns it off.")] = 1.0
    tail_drop: Annotated[
        Drops,
        Field(
            description="Shares of the kept tokens to drop, one budget each. Models that compute every token have one "
            "budget."
        ),
    ] = (0.0, 0.3, 0.6)
    map_images: Annotated[PositiveInt, Field(description="Number of images whose keep maps are shown.")] = 6
    vae: Annotated[
        str | None,
        Field(
            description="Autoencoder that decodes latents, a path or a hub id; null takes the one that encoded the "
            "training data."
        ),
    ] = None
    ema: Annotated[bool, Field(description="Use the averaged weights.")] = True
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        Field(description="`bf16` computes matrix products in bfloat16; `auto` does so on a GPU only."),
    ] = "auto"
    device: Annotated[
        str, Field(description="`auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.")
    ] = "auto"


class ReportConfig(Drawing):
    """Settings of `tokdyn report`."""

    out: Annotated[UserPath, AfterValidator(_page), Field(description="Page to write.")] = Path("report.html")


class PlotConfig(Drawing):
    """Settings of `tokdyn plot`."""

    out: Annotated[UserPath, Field(description="Folder to write the figures to.")] = Path("figures")
    formats: Annotated[Formats, Field(description="Formats of each figure: `png`, `svg`, `pdf`.")] = (
        "png",
        "svg",
        "pdf",
    )
    count: Annotated[
        int, Field(ge=1, le=1000, description="Images per run and budget, from the same seeds in each.")
    ] = 8
    map_images: Annotated[PositiveInt, Field(description="Number of images whose keep maps are drawn.")] = 3
