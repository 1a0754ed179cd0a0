"""Repeat recorded calls of a model, and watch its blocks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.adapters import adapter_for
from tokdyn.adapters.clock import Level, with_level
from tokdyn.adapters.tokens import rotate, split
from tokdyn.attach import Site, attachment_of, blocks_of, find_sites
from tokdyn.cost.counter import operator_formulas
from tokdyn.errors import InputError, UnsupportedModelError
from tokdyn.recorder import Call, moved
from tokdyn.tokens import ImageTokens, Packing, total
from tokdyn.trace.calls import CallTrace

Counts = TypeVar("Counts")
Spent = Callable[[], int]


@dataclass(frozen=True)
class Look:
    """A block in one call, before or after it runs.

    Attributes:
        block: number of the block, counted over all lists of blocks.
        x: its input or output image tokens: (B, N, D), or packed rows (T, D).
        packing: which sample each packed row belongs to; None if rows are not packed.
    """

    block: int
    x: Tensor
    packing: Packing | None


Watch = Callable[[Look], None]


class Replay:
    """A model whose recorded calls can be repeated.

    Args:
        model: not wrapped.
        level: the noise level of a call, as in `tokdyn.wrap`; None leaves it to the adapter.

    Raises:
        UnsupportedModelError: the model has no adapter, or no noise level.
        InputError: the model is wrapped, or the level is none.
    """

    def __init__(self, model: nn.Module, level: Level | None = None) -> None:
        if attachment_of(model) is not None:
            raise InputError(
                f"this {type(model).__name__} is wrapped, but a calibration measures models without methods; call "
                "tokdyn.unwrap first, and wrap it with the result."
            )
        self.model, self.level = model, level
        self.adapter = with_level(adapter_for(model), model, level)
        if self.adapter.inferred or self.adapter.level is None:
            reason = "no adapter is declared for it" if self.adapter.inferred else "it has no noise level"
            raise UnsupportedModelError(f"{type(model).__name__} cannot be calibrated: {reason} (docs/adapters.md).")
        self._counts: dict[Any, Any] = {}

    @property
    def depth(self) -> int:
        """Number of blocks of the model."""
        return sum(len(blocks_of(self.model, stack)) for stack in self.adapter.blocks)

    def __call__(self, call: Call) -> Any:
        """Repeat a call and return the output of the model."""
        return self.model(**self._arguments(call))

    def levels(self, call: Call, batch: int) -> tuple[float, ...]:
        """Return the noise level of every sample, read like in wrapped models."""
        assert self.adapter.level is not None
        values = CallTrace(self.adapter.level(self.model, call)).levels.tolist()
        return tuple(values * (batch if len(values) == 1 else 1))

    def counted(self, call: Call, compute: Callable[[Spent], Counts]) -> Counts:
        """Count FLOPs while something runs, once per shape of the arguments unless the data decides what runs.

        Args:
            call: the arguments.
            compute: gets a function that returns the FLOPs spent so far (a multiply-add is 2), and returns its counts.
                It is called even if the counts are already known.
        """
        shapes = _shapes(call)
        if shapes in self._counts and not self.adapter.chunked:
            compute(lambda: 0)
        else:
            counter = FlopCounterMode(display=False, custom_mapping=operator_formulas())
            with counter:
                self._counts[shapes] = compute(lambda: int(counter.get_total_flops()))
        counts: Counts = self._counts[shapes]
        return counts

    @contextmanager
    def watching(self, call: Call, before: Watch, after: Watch) -> Iterator[None]:
        """Call `before` and `after` around every block of calls with these arguments within this context."""
        known: list[ImageTokens] = []  # read once if the blocks also get text

        def image(x: Tensor, site: Site) -> Tensor:
            if site.blocks.image == "all" or self.adapter.grid is None:
                return x
            if not known:
                known.append(self.adapter.image_tokens(self.model, call))
            images = known[0]
            return split(rotate(x, images.rotation), total(images), site.blocks.image)[1]

        def entering(site: Site) -> Callable[..., None]:
            def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = _named(site, args, kwargs)
                before(Look(site.block, image(given[site.blocks.tokens], site), given.get(site.blocks.packing or "")))

            return hook

        def leaving(site: Site) -> Callable[..., None]:
            def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                parts = out if isinstance(out, tuple) else (out,)
                x = dict(zip(site.blocks.returns, parts, strict=False))["tokens"]
                after(Look(site.block, image(x, site), _named(site, args, kwargs).get(site.blocks.packing or "")))

            return hook

        sites = find_sites(self.model, self.adapter, sublayers=False)
        with ExitStack() as stack:
            for part in self.model.modules():
                if id(part) in sites:
                    site = sites[id(part)]
                    stack.callback(part.register_forward_pre_hook(entering(site), with_kwargs=True).remove)
                    stack.callback(part.register_forward_hook(leaving(site), with_kwargs=True).remove)
            yield

    def _arguments(self, call: Call) -> Call:
        """Move the arguments to the device of the model."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return call if device.type == "meta" else {name: moved(value, device) for name, value in call.items()}


def _named(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name all arguments of a block."""
    return {**dict(zip(site.names, args, strict=False)), **kwargs}


def prediction(output: Any) -> Tensor:
    """Return the prediction (B, ...) from the output of a model."""
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return torch.stack(list(output)) if isinstance(output, Sequence) else output


def _shapes(value: Any) -> Any:
    """Return what determines the cost of a call: shapes of tensors, and values of other arguments."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return tuple((name, _shapes(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return tuple(_shapes(part) for part in value)
    return value if isinstance(value, int | float | str | None) else type(value).__name__
