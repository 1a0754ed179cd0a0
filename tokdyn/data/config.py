"""Define the section `data` of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from tokdyn.files import UserPath
from tokdyn.limits import CLASSES, PIXELS, SAMPLES
from tokdyn.reading import shown
from tokdyn.section import Positive, Section, at_most

CACHE_LIMIT = 256 * 2**30  # bytes
_SIDE = re.compile("[0-9]{1,9}")


def _rows_and_columns(value: object) -> object:
    """Convert a size such as 32, "32" or "32x48" to one number or (rows, columns); reject other values."""
    sides = value.split("x") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [int(side) for side in sides if type(side) is int or (isinstance(side, str) and _SIDE.fullmatch(side))]
    if len(numbers) != len(sides) or len(numbers) not in (1, 2) or min(numbers) < 1:
        given = value[:40] if isinstance(value, str) else shown(value)
        raise ValueError(f"expected a number of pixels or ROWSxCOLUMNS, each at least 1, got {given}")
    if excess := PIXELS.excess(numbers[0] * numbers[-1]):
        raise ValueError(f"these are {excess}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


Size = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(_rows_and_columns)]


class DataConfig(Section):
    """The data to train on; `tokdyn.data.open_data` opens the data set.

    Attributes:
        kind: "shapes" (procedural images), "images" (folder or zip with class folders) or "latents" (written by
            `tokdyn features`).
        path: folder, zip, tar shards or an address. Tar shards may be a pattern such as `shards/{000..010}.tar`, and
            addresses begin as s3://bucket/latents does. Required for images and latents.
        size: image size in pixels, one number or (rows, columns), also written "32x48". Required for images; 32 by
            default for shapes; latents have a size of their own, in latent pixels, which a size given here must equal.
        channels: 1 grey, 3 colour, 4 colour and alpha (shapes: four colour channels). Ignored for latents.
        flip: mirror each sample left to right with probability 1/2, drawn anew in every epoch.
        on_error: "raise" stops at the first unreadable image; "skip" leaves such images out with a warning.
        seed: seed of the procedural shapes.
        num_classes: expected number of classes. 1 puts all images into one class; shapes may have 1 to 10.
        length: samples in one epoch of the procedural shapes.
        in_memory: hold decoded images in memory as bytes; None does so if they take at most `memory_limit` bytes.
        memory_limit: bytes that decoded images may take if `in_memory` is None; 2 GiB by default.
        cache: folder in which parts of remote data are kept; None takes that of downloads.
        cache_limit: bytes that it may take, of all data sets together; 256 GiB by default.
    """

    kind: Literal["shapes", "images", "latents"] = "shapes"
    path: str | None = Field(default=None, coerce_numbers_to_str=True)
    size: Size | None = None
    channels: Literal[1, 3, 4] = 3
    flip: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    num_classes: Annotated[Positive, at_most(CLASSES)] | None = None
    length: Annotated[Positive, at_most(SAMPLES)] = 50_000
    in_memory: bool | None = None
    memory_limit: int = Field(default=2 * 1024**3, ge=0, lt=2**63)
    cache: UserPath | None = None
    cache_limit: int = Field(default=CACHE_LIMIT, ge=0, lt=2**63)


def rows_and_columns(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return a size as (rows, columns); a single number stands for a square."""
    return (size, size) if isinstance(size, int) else size
