"""Open and close the brackets at a block: its tokens are made dense, told from text and references, and handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tokdyn.adapters.base import Blocks
from tokdyn.adapters.tokens import apart, join, rotate, split, together
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Selector
from tokdyn.attach.sites import Site
from tokdyn.attach.view import TokenView
from tokdyn.errors import InputError
from tokdyn.ops.dropping import put_back, take


def open_brackets(frame: Frame, module: nn.Module, site: Site, named: dict[str, Any]) -> tuple[Tensor, TokenView]:
    """Open the brackets that begin with a block; return its tokens and their view afterwards."""
    brackets = [bracket for bracket in frame.handlers.brackets if bracket.first == site.block]
    return _act(frame, brackets, site, named[site.blocks.tokens], BlockCall(module, site, named))


def close_brackets(frame: Frame, site: Site, tokens: Tensor) -> Tensor:
    """Close the brackets that end with a block; return its tokens afterwards."""
    brackets = [bracket for bracket in reversed(frame.handlers.brackets) if bracket.last == site.block]
    return _act(frame, brackets, site, tokens, None)[0]


def _act(
    frame: Frame, brackets: Sequence[Bracket], site: Site, tokens: Tensor, block: BlockCall | None
) -> tuple[Tensor, TokenView]:
    """Open brackets before a block, or close them if it is None; return the tokens and their view afterwards."""
    context, view = frame.context, frame.view
    if not brackets:
        return tokens, view
    before, rotation = view.packing, context.rotation(site.blocks)
    tokens, view = view.padded(rotate(tokens, rotation))
    text, x = view.split(tokens, site.blocks)
    for bracket in brackets:
        if block is None or not view.all_idle:  # else no block inside of it will run
            x, view = _act_one(frame, bracket, view, x, block)
    tokens = rotate(join(text, x, site.blocks.image), rotation, back=True)
    if before is not None:
        tokens, view = view.packed(tokens, before)
    context.view = view
    return tokens, view


def _act_one(
    frame: Frame, bracket: Bracket, view: TokenView, x: Tensor, block: BlockCall | None
) -> tuple[Tensor, TokenView]:
    """Open a bracket, or close it if the block is None; one that selects tokens gets the generated ones only."""
    context, selects = frame.context, isinstance(bracket, Selector) and bracket.selects(frame.context)
    beside = context.beside if selects else (0, 0)
    first, x, last = apart(x, beside, view.lengths)
    inner = view.generated(beside)
    x, inner = bracket.close(frame, inner, x) if block is None else bracket.open(frame, inner, x, block)
    if not selects and inner.room < view.room and any(context.beside):
        raise InputError(
            f"{type(bracket).__name__} selects among the tokens of reference images too; let it be a Selector, which "
            "gets the generated tokens only."
        )
    return together(first, x, last, inner.lengths), inner.among(beside)


def gathered(view: TokenView, whole: Tensor, blocks: Blocks) -> Tensor:
    """Take the tokens of a view from a sequence with all image tokens, (B, S, D), text tokens included."""
    if view.index is None:
        return whole
    text, x = split(whole, view.cells, blocks.image)
    return join(text, take(x, view.index), blocks.image)


def scattered(view: TokenView, tokens: Tensor, whole: Tensor, blocks: Blocks) -> Tensor:
    """Put the tokens of a view back among all image tokens of `whole`; the inverse of `gathered`."""
    if view.index is None:
        return tokens
    text, x = view.split(tokens, blocks)
    rest = split(whole, view.cells, blocks.image)[1]
    return join(text, put_back(x, rest, view.index, view.lengths), blocks.image)
