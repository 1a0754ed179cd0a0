"""Gradient checkpointing of a wrapped model: blocks are computed again in the run that they belong to.

Brackets and gates act outside of what is computed again, so nothing is drawn, decided or counted twice. What a block
uses of their tensors goes in as arguments, and what they want to know of its inside comes out as results, so that both
have their gradients however the block is computed again.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tokdyn.attach import class_swap
from tokdyn.attach.run import Run

_NAME = "_gradient_checkpointing_func"


def bind(model: nn.Module, run: Run) -> list[tuple[nn.Module, Any]]:
    """Let checkpointing know the run while its model is called; returns what was there, for `release`."""
    bound = []
    for part in model.modules():
        function = part.__dict__.get(_NAME)
        if function is not None:
            bound.append((part, function))
            part.__dict__[_NAME] = _checkpointing(function, run)
    return bound


def release(bound: list[tuple[nn.Module, Any]]) -> None:
    """Put back what `bind` replaced."""
    for part, function in bound:
        part.__dict__[_NAME] = function


def _checkpointing(function: Any, run: Run) -> Any:
    def checkpoint(block: nn.Module, *args: Any) -> Any:
        if id(block) not in run.roles:
            return function(block, *args)

        def saving(*a: Any) -> Any:
            here = run.here()  # of this block, for the time when it is computed again
            names, given = list(run.given), list(run.given.values())
            keys: list[Any] = []
            several = False

            def plain(*again: Any) -> Any:
                nonlocal several
                before, now = class_swap.enter(run), run.here()
                run.go(here)
                run.given, run.found = dict(zip(names, again[len(a) :], strict=True)), {}
                try:
                    out = class_swap.base_class(block).__call__(block, *again[: len(a)])
                    several, keys[:] = isinstance(out, tuple), list(run.found)
                    return (*(out if several else (out,)), *run.found.values())
                finally:
                    run.go(now)
                    class_swap.enter(before)

            out = function(plain, *a, *given)
            own = len(out) - len(keys)
            run.found.update(zip(keys, out[own:], strict=True))
            return out[:own] if several else out[0]

        return run.block(block, run.roles[id(block)], saving, args, {})

    return checkpoint
