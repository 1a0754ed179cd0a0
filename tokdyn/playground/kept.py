"""Watch which tokens a wrapped model computes by themselves, and which it leaves out or merges into others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokdyn.attach import Attachment, Bracket, CallContext, Sublayer, TokenView, attachment_of
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, cells
from tokdyn.trace.branches import BOTH, is_unconditional, split

_CHANNELS = 16  # by which a token is recognised


class KeptCells:
    """The cells that the last call computed by themselves, of the first image of the conditional branch."""

    def __init__(self) -> None:
        self._context: CallContext | None = None
        self._keep: Tensor | None = None
        self._merged = False

    def take(self) -> NDArray[np.bool_] | None:
        """Return and forget them, (R, C) bool; of a video those of the first frame.

        None if there was no call, if the call computed every token, or if its tokens form no grid of two axes.
        """
        context, keep = self._context, self._keep
        self._context, self._keep = None, None
        if context is None or keep is None or len(context.grid) < 2:
            return None
        rows, columns = context.grid[-2:]
        found: NDArray[np.bool_] = keep[: rows * columns].view(rows, columns).cpu().numpy()
        return found

    def opened(self, plain: Callable[..., Any], frame: Any, view: TokenView, *rest: Any) -> Any:
        """Open a bracket, and note the tokens that it selects and the samples that it lets skip the blocks."""
        x, after = plain(frame, view, *rest)
        context: CallContext = frame.context
        place, grid = _place(context, view), _grid(context)
        if place is None or grid is None:
            return x, after
        if place in after.idle and place not in view.idle:
            self._note(context, torch.zeros(cells(grid), dtype=torch.bool))
        elif after.index is not None and after.index is not view.index:
            keep = torch.zeros(cells(grid), dtype=torch.bool, device=after.index.device)
            self._note(context, keep.index_fill(0, after.index[place, : after.sizes[place]], True))
        return x, after

    def around(
        self, plain: Callable[..., Any], frame: Any, view: TokenView, site: Any, call: Any, named: dict[str, Any]
    ) -> Any:
        """Compute a sublayer, and note the tokens that it gets by themselves; of each call the first that merges any.

        A token that was not merged is among the sublayer's tokens as it was.
        """
        context: CallContext = frame.context
        place, done = _place(context, view), self._context is context and self._merged
        if place is None or done or view.packing is not None:
            return plain(frame, view, site, call, named)

        def watched(**arguments: Any) -> Any:
            before, after = named.get(site.tokens), arguments.get(site.tokens)
            if isinstance(before, Tensor) and isinstance(after, Tensor) and _merged(before, after):
                self._note_merged(context, view, place, before[place], after[place])
            return call(**arguments)

        return plain(frame, view, site, watched, named)

    def _note_merged(self, context: CallContext, view: TokenView, place: int, before: Tensor, after: Tensor) -> None:
        """Note which tokens of a sample, (S, D) before merging, are still among those (M, D) after it."""
        grid, (first, last) = _grid(context), context.beside
        if grid is None or len(before) != view.room or (view.index is not None and first + last):
            return  # text is in the same sequence, or a selection among references
        alone = torch.isin(_hashed(before), _hashed(after))
        if view.index is None:
            keep = alone[first : first + cells(grid)]
        else:
            count = view.sizes[place]
            keep = alone.new_zeros(cells(grid)).index_copy(0, view.index[place, :count], alone[:count])
        self._note(context, keep)
        self._merged = True

    def _note(self, context: CallContext, keep: Tensor) -> None:
        """Add what a method keeps, (N,) bool, to what others of the same call keep."""
        if self._context is not context:
            self._context, self._keep, self._merged = context, None, False
        self._keep = keep if self._keep is None else self._keep & keep.to(self._keep.device)


def _merged(before: Tensor, after: Tensor) -> bool:
    """Return whether the same samples have fewer tokens than before."""
    return len(after) == len(before) and after.shape[1] < before.shape[1]


def _hashed(tokens: Tensor) -> Tensor:
    """Return a number (n,) int64 for each token (n, D), equal for tokens with equal bits."""
    bits = tokens.detach()[:, :_CHANNELS].contiguous().view(torch.uint8).long()
    weights = torch.randint(2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0))
    return (bits * weights.to(bits.device)).sum(dim=1)


def _grid(context: CallContext) -> Grid | None:
    """Return the grid of the generated tokens; None if it cannot be read."""
    try:
        return context.grid
    except InputError:
        return None


def _place(context: CallContext, view: TokenView) -> int | None:
    """Return the place in a view of the first image of the conditional branch; None if it is not there."""
    seen = context.trace.observed
    branch = None if seen is None else seen.branch
    if branch == BOTH:
        branch = context.adapter.halves
    sample = 0
    if isinstance(branch, tuple):
        told = split(context.trace.batch, branch) or []
        sample = next((rows[0] for name, rows in told if rows and not is_unconditional(name)), 0)
    elif branch is not None and is_unconditional(branch):
        return None
    return view.samples.index(sample) if sample in view.samples else None


@contextmanager
def watching(*models: nn.Module) -> Iterator[KeptCells]:
    """Watch the calls of models while the context is open. Models that are not wrapped are not watched."""
    kept = KeptCells()
    originals: dict[int, Any] = {}
    attachments: list[Attachment] = [each for each in map(attachment_of, models) if each is not None]

    def watched(handler: Any) -> Any:
        """Return a copy of a handler that also notes what it does."""
        name = "open" if isinstance(handler, Bracket) else "around" if isinstance(handler, Sublayer) else None
        if name is None:
            return handler
        made = copy.copy(handler)
        act = kept.opened if name == "open" else kept.around
        vars(made)[name] = partial(act, MethodType(getattr(type(handler), name), made))
        originals[id(made)] = handler
        return made

    for attachment in attachments:
        attachment.replace_handlers(watched)
    try:
        yield kept
    finally:
        for attachment in attachments:
            attachment.replace_handlers(lambda handler: originals.get(id(handler), handler))
