"""The data section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt


def _rows_and_columns(value: object) -> object:
    """Accept "32x48" for (32, 48), as it is typed on a command line; reject what is not a size."""
    sides = value.split("x") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [int(side) for side in sides if type(side) is int or (isinstance(side, str) and side.isdecimal())]
    if len(numbers) != len(sides) or len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"expected a number of pixels or ROWSxCOLUMNS, each at least 1, got {value}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


Size = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(_rows_and_columns)]


class DataConfig(BaseModel):
    """Which data to train on; `open_data` turns it into a data set.

    Attributes:
        kind: "shapes" (procedural), "images" (folder or zip with class folders) or "latents" (`tokdyn features`).
        path: folder or zip file; images and latents need it.
        size: pixels, one number or (rows, columns), also written "32x48". Images need it, shapes take 32 by default,
            and latents have their own, which a size given here must equal.
        channels: 1 grey, 3 colour, 4 colour and alpha (shapes: four colour channels). Latents have their own.
        flip: mirror half of the samples left to right, drawn anew for every epoch.
        on_error: "raise" stops at the first unreadable image, "skip" leaves such images out with a warning.
        seed: seed of the procedural shapes.
        num_classes: expected number of classes. 1 puts all images into one class; shapes may have 1 to 10.
        length: samples in one epoch of the procedural shapes.
        in_memory: hold decoded images in memory as bytes; None does so if they take at most `memory_limit` bytes.
        memory_limit: bytes that decoded images may take when `in_memory` is None; 2 GiB by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["shapes", "images", "latents"] = "shapes"
    path: str | None = Field(default=None, coerce_numbers_to_str=True)
    size: Size | None = None
    channels: Literal[1, 3, 4] = 3
    flip: bool = False
    on_error: Literal["raise", "skip"] = "raise"
    seed: int = 0
    num_classes: PositiveInt | None = None
    length: PositiveInt = 50_000
    in_memory: bool | None = None
    memory_limit: int = Field(default=2 * 1024**3, ge=0)


def rows_and_columns(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of a size that may be a single number."""
    return (size, size) if isinstance(size, int) else size
