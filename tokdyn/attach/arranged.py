"""Call the attention and the MLP of a block that takes its tokens in an arrangement of its own.

Handlers get the tokens of an MLP with samples on the first axis and tokens on the second. They get those of attention
as attention takes them, if it splits samples into parts, and then a view in which every part is a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokdyn.adapters.arrangement import change_results
from tokdyn.attach import class_swap
from tokdyn.attach.handlers.base import Frame
from tokdyn.attach.sites import Site
from tokdyn.attach.view import TokenView
from tokdyn.tokens import Grid, cells

Call = Callable[..., Any]


def call_arranged(
    through: Call, frame: Frame, site: Site, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Arrange the arguments of a sublayer for handlers, call it through them, and arrange its result as it was.

    Args:
        through: calls a sublayer through the handlers, as `through(frame, site, call, (), named, False)`.
        frame: the frame of the call of the block.
        site: the site of the sublayer.
        call: the original call of the sublayer.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    arrangement, names = site.blocks.arrangement, site.names[: len(args)]
    assert arrangement is not None
    named = {**dict(zip(names, args, strict=True)), **kwargs}
    images, attention = frame.context.readings.images, site.kind == "attention"

    def inner(**arguments: Any) -> Any:
        return call(*[arguments.pop(name) for name in names], **arguments)

    parts, grid = frame.context.parts(site.blocks)
    if attention and grid is not None:
        inside = frame._replace(view=in_parts(frame.view, parts, grid))
        return class_swap.within(inside, through, inside, site, inner, (), named, False)

    def as_taken(**arguments: Any) -> Any:
        out = inner(**arrangement.outward(arguments, images))
        return change_results(out, site.names, lambda results: arrangement.inward(results, images))

    named = dict(arrangement.inward(named, images))
    out = through(frame, site, as_taken if attention else inner, (), named, False)
    return change_results(out, site.names, lambda results: arrangement.outward(results, images))


def in_parts(view: TokenView, parts: int, grid: Grid) -> TokenView:
    """Return the view in which every part of a sample is a sample of its own, at the place of that sample in the batch.

    Args:
        view: a view of all tokens.
        parts: number of parts of a sample.
        grid: the grid of a part.
    """
    samples = tuple(sample for sample in view.samples for _ in range(parts))
    return replace(view, samples=samples, cells=cells(grid), room=cells(grid), grid=grid)
