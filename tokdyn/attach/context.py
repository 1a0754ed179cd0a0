"""The context of one call of a wrapped model: its arguments, what is read from them, its trace, and slots for handlers.

State that outlasts the call is in the attachment, and the samples and tokens of a block call are in its `TokenView`.
Nothing in the context changes its meaning while a block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Blocks, ModelAdapter
from tokdyn.adapters.counting import counted_rows, other_tokens, rounds_of
from tokdyn.attach.inferred import Guard
from tokdyn.attach.offload import Residency
from tokdyn.attach.sites import Site
from tokdyn.attach.view import FollowedArguments, TokenView
from tokdyn.errors import InputError
from tokdyn.lazy import Lazy
from tokdyn.tokens import Grid, ImageTokens, beside, cells, total
from tokdyn.trace.agreement import Agreement
from tokdyn.trace.calls import BlockTrace, CallTrace, per_sample
from tokdyn.trace.trajectory import Position, Trajectory

Named = Mapping[str, Any]  # arguments by name


@dataclass(frozen=True)
class Settings:
    """What the user has set for the following calls, by the functions of `tokdyn.attach.controls`.

    Attributes:
        tail_drop: a share for all samples, for each of them, or for each guidance branch by name; None sets none.
        drop_rate: rate at which TokenDrop acts, in sampling too; None lets it act in training only, at its own rate.
        calibrating: whether routers adjust their bias to the tokens of this call.
        beside_dense: whether every call in sampling is made without methods too, to compare their times.
        agreement: the processes that decide alike which steps FeatureCache caches; None if this one decides alone.
        keep: bool mask, on the host, of tokens that TokenMerge and TokenDrop leave alone; shapes as in `fit_mask`.
    """

    tail_drop: tuple[float, ...] | dict[str, float] | None = None
    drop_rate: float | None = None
    calibrating: bool = False
    beside_dense: bool = False
    agreement: Agreement | None = None
    keep: Tensor | None = None


@dataclass
class Readings:
    """Values that are read from the arguments of a call at their first use, which synchronises with an accelerator.

    Attributes:
        images: the grids of the generated image and of reference images.
        levels: noise levels, one for each sample or one for all.
        position: step, guidance branch and image of the call.
        followed: entries of the blocks' arguments for the tokens of views.
        behind: number of tokens that follow the image tokens; see `ModelAdapter.behind`.
        time: the embedding of the timestep, noted when the model computes it, if a method reads it.
    """

    images: Lazy[ImageTokens]
    levels: Lazy[tuple[float, ...]]
    position: Lazy[Position]
    followed: FollowedArguments
    behind: int = 0
    time: Tensor | None = None


@dataclass(eq=False)
class CallContext:
    """One call of the model.

    Attributes:
        model: the wrapped model.
        adapter: the adapter of the model.
        arguments: the arguments of the call, by name.
        settings: what the user has set for this call.
        trace: what was computed so far.
        slots: the state of each handler, at the index of its slot; None until the handler sets it.
        readings: values that are read from the arguments.
        guard: checks of a model whose adapter was inferred; None for other models.
        residency: which offloaded weights are on the computing device.
        counted: returns the FLOPs counted so far, while `tokdyn.flops` counts; else None.
        losses: auxiliary losses so far, by the name of the method.
        view: the view of the next block, which changes when brackets open and close; None before the first block.
    """

    model: nn.Module
    adapter: ModelAdapter
    arguments: Mapping[str, Any]
    settings: Settings
    trace: CallTrace
    slots: list[Any]
    readings: Readings
    guard: Guard | None
    residency: Residency
    counted: Callable[[], int] | None
    losses: dict[str, Tensor]
    view: TokenView | None = None

    @property
    def training(self) -> bool:
        """Whether the model is in training mode and gradients are enabled."""
        return self.trace.training

    @property
    def images(self) -> ImageTokens:
        """The grids of the generated image and of references; an InputError if they cannot be read or do not fit."""
        return self.readings.images.value

    @property
    def grid(self) -> Grid:
        """The grid of the generated tokens; see `images`."""
        return self.images.grid

    @property
    def beside(self) -> tuple[int, int]:
        """Number of reference tokens before and after the generated tokens of a sample; see `images`."""
        return beside(self.images)

    def rotation(self, blocks: Blocks) -> tuple[int, ...]:
        """Return by how many places each sample's sequence is rotated in these blocks; see `ImageTokens`."""
        if blocks.image != "all" and self.readings.images.known:
            return self.images.rotation
        return (-self.readings.behind,) if self.readings.behind and blocks.image != "all" else ()

    def parts(self, blocks: Blocks) -> tuple[int, Grid | None]:
        """Return into how many parts attention splits a sample's tokens, and the grid of each; see `Arrangement`."""
        split = None if blocks.arrangement is None else blocks.arrangement.parts
        return (1, None) if split is None else split(self.grid)

    @property
    def position(self) -> Position:
        """Step, guidance branch and image of this call. A handler that uses it must read it in every call."""
        return self.readings.position.value

    def levels(self, view: TokenView) -> tuple[float, ...]:
        """Return the noise level of every sample of a view, on the host; 1 is pure noise."""
        values = per_sample(self.readings.levels.value, self.trace.batch, "the timestep")
        return tuple(values[sample] for sample in view.samples)

    def level_tensor(self, view: TokenView, device: torch.device | str) -> Tensor:
        """Return the noise levels of a view, (b,) or (1,) fp32 on a device, without synchronising with it."""
        read = self.readings.levels
        values = (torch.tensor(read.value) if read.known else self.trace.levels).to(device)
        if len(values) > 1 and view.samples != tuple(range(len(values))):
            values = values.index_select(0, torch.tensor(view.samples, device=device))
        return values

    def check_images(self, images: ImageTokens) -> ImageTokens:
        """Return the grids, after checking that the blocks get as many image tokens as they have cells, if it is known.

        Raises:
            InputError: they have not.
        """
        if self.trace.cells not in (0, total(images)):
            sizes = [" x ".join(map(str, grid)) for grid in (images.grid, *images.references)]
            references = f", with references of {', '.join(sizes[1:])}" if sizes[1:] else ""
            raise InputError(
                f"the token grid of this {type(self.model).__name__} is {sizes[0]}{references}, but its blocks get "
                f"{self.trace.cells} image tokens; leave out arguments that add tokens."
            )
        return images

    def view_of(self, named: Named, blocks: Blocks, before: TokenView, separate: bool, needed: bool) -> TokenView:
        """Return the view of a block's tokens: the previous block's, or all at the first, which begins the trace.

        Args:
            named: the arguments of the block, by name.
            blocks: the adapter's declaration of the block.
            before: the view of the frame.
            separate: whether handlers tell text tokens from image tokens.
            needed: whether handlers need the number of image tokens.
        """
        view, tokens, packing, trace = self.view, named[blocks.tokens], None, self.trace
        batch = tokens.shape[0]  # `len` of a tensor takes a microsecond, in every block
        if blocks.packing is not None:
            packing = named[blocks.packing]
            batch = len(packing.lengths)
        if view is not None and view.batch == batch:
            return view
        samples = before.samples if before.batch == batch else tuple(range(batch))
        if packing is not None:
            view = TokenView(samples, cells(packing.grid), packing.longest, tokens.device, packing=packing)
            if not trace.batch:
                trace.batch, trace.cells, trace.kept = batch, view.cells, packing.lengths
            return view
        count = trace.cells or self._image_tokens(tokens, blocks, separate, needed)
        if not trace.batch:
            trace.batch, trace.cells = batch, count
            trace.text, trace.context = other_tokens(named, blocks, count)
            trace.rounds = rounds_of(named, blocks, batch)
            if blocks.counted:
                sizes, rows = (batch, count, trace.text, trace.context), counted_rows(named, blocks, batch)
                trace.first = BlockTrace(0, *sizes, rounds=trace.rounds, given=rows, whole=rows)
            if self.readings.images.known:
                self.check_images(self.images)
        return TokenView(samples, count, count, tokens.device)

    def _image_tokens(self, tokens: Tensor, blocks: Blocks, separate: bool, needed: bool) -> int:
        """Count the image tokens of the first block; all tokens, if the grid is not known and no method needs it."""
        if self.adapter.grid is None:
            self.readings.images.put(ImageTokens((tokens.shape[1],)))
        elif blocks.image != "all" and (separate or blocks.text_sees_less):
            try:
                return total(self.images)
            except InputError:
                if needed:
                    raise
        return tokens.shape[1]

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to an auxiliary loss of this call."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def which(self, view: TokenView) -> tuple[int, ...] | None:
        """Return the positions in the batch of a view's samples; None if the view has all samples."""
        return None if len(view.samples) == self.trace.batch else view.samples

    def record(self, view: TokenView, site: Site, named: Named, whole: Named | None = None) -> BlockTrace:
        """Add a computation of a block for the samples of a view, with arguments `named`, to the trace; return it.

        `whole` are the arguments of all samples, if they differ.
        """
        lengths = () if view.packing is None else view.packing.lengths
        rows = lengths if len(set(lengths)) > 1 else None
        tokens = view.room if view.packing is None else view.packing.longest
        beside = (0, 0) if view.packing is not None else other_tokens(named, site.blocks, tokens)
        rounds = rounds_of(named, site.blocks, view.batch)
        self.trace.text, self.trace.context = max(self.trace.text, beside[0]), max(self.trace.context, beside[1])
        block = BlockTrace(site.block, view.batch, tokens, *beside, rows=rows, which=self.which(view), rounds=rounds)
        if site.blocks.counted:
            block.given = counted_rows(named, site.blocks, view.batch)
            block.whole = block.given if whole is None else counted_rows(whole, site.blocks, self.trace.batch)
        self.trace.blocks.append(block)
        return block

    def finish(self, recomputed: bool) -> CallTrace:
        """Return the trace of the call; start an empty one if its blocks may be recomputed in the backward pass."""
        trace = self.trace
        if recomputed:
            self.trace = trace.blank()
        return trace

    def release(self, recomputed: bool) -> None:
        """Release the arguments after the call, and what handlers hold unless its blocks may be recomputed with it."""
        self.arguments, self.readings.followed, self.readings.time = {}, FollowedArguments(), None
        if not recomputed:
            self.slots[:] = [None] * len(self.slots)
        self.readings.images.close()
        self.readings.position.close()


def open_context(
    model: nn.Module,
    adapter: ModelAdapter,
    arguments: Mapping[str, Any],
    settings: Settings,
    trace: CallTrace,
    slots: list[Any],
    trajectory: Trajectory,
    guard: Guard | None,
    counted: Callable[[], int] | None,
) -> CallContext:
    """Create the context of a call, which belongs to this trajectory. Nothing is read from the arguments yet.

    The other parameters are attributes of the context; `trace` is a new one, and no slot is filled.
    """
    readings = Readings(
        Lazy(lambda: context.check_images(adapter.image_tokens(model, context.arguments))),
        Lazy(lambda: _read_levels(trace)),
        Lazy(lambda: trajectory.position(trace.observed, trace.batch)),
        FollowedArguments(),
        0 if adapter.behind is None else adapter.behind(arguments),
    )
    context = CallContext(model, adapter, arguments, settings, trace, slots, readings, guard, Residency(), counted, {})
    return context


def _read_levels(trace: CallTrace) -> tuple[float, ...]:
    """Read the noise levels of a call, with all that was observed of it: the host waits once for both."""
    if trace.observed is None or torch.compiler.is_compiling():
        return tuple(trace.levels.tolist())
    levels = tuple(each.level for each in trace.observed.samples)
    return levels if isinstance(trace.level, Tensor) and trace.level.numel() > 1 else levels[:1]


def is_offloaded(module: nn.Module) -> bool:
    """Return whether hooks of accelerate or diffusers onload the weights of a module when it is called."""
    held = vars(module)
    return "_hf_hook" in held or "_diffusers_hook" in held
