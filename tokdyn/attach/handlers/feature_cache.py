"""The handlers of FeatureCache: skip the blocks in some steps, and add the effect that they had in an earlier step.

The effect of blocks is their output minus their input. A step is cached if the settings list it, or if the accumulated
change of a tensor, the indicator, since the last computed step is below a threshold. Each guidance branch has a memory
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.base import Blocks
from tokdyn.adapters.coupling import coupled_parts, together
from tokdyn.adapters.splitting import splits, token_group
from tokdyn.adapters.time import embedding_in
from tokdyn.adapters.tokens import rotate
from tokdyn.attach.context import CallContext, is_offloaded
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Plan, handles
from tokdyn.attach.view import TokenView
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import FeatureCache
from tokdyn.methods.costs import filter_flops
from tokdyn.ops.seacache import sea_filter
from tokdyn.tokens import cells
from tokdyn.trace.agreement import Ranks
from tokdyn.trace.effects import Effect, Remembering
from tokdyn.trace.memory import BranchMemory, Memory
from tokdyn.trace.observation import main_input, prediction_in
from tokdyn.trace.reuse import decide, nothing_accumulated


@dataclass
class Reuse:
    """The state between the first and the last block.

    Attributes:
        start: (B, N, D) the tokens before the blocks.
        streams: the tokens (B, L, D) of further streams before the blocks.
        reused: for each sample, whether its blocks are skipped and the remembered effect is added.
        fresh: for each sample, whether another image or conditioning is remembered, or none.
        branch: the memory of the branch.
        view: the view of `start`.
    """

    start: Tensor
    streams: list[Tensor]
    reused: Sequence[bool]
    fresh: Sequence[bool]
    branch: BranchMemory
    view: TokenView


@dataclass(eq=False)
class CachedBlocks(Bracket):
    """Decides for each sample whether it skips the blocks `first` to `last`, and adds the remembered effect if so.

    With `indicator="first_block"` it opens after the first block, whose effect `FirstBlock` puts into its slot.

    Attributes:
        method: the settings.
        slot: slot of the state: a `Reuse` between the first and the last block.
        memory: what is remembered from call to call.
    """

    method: FeatureCache
    first: int
    last: int
    slot: int
    memory: Memory = field(default_factory=Memory)

    @property
    def remembering(self) -> Remembering:
        """How effects are remembered and forecast."""
        return Remembering.of(self.method.forecast, self.method.residual_dtype, self.method.residual_device)

    @property
    def never(self) -> bool:
        """Whether the settings let no step be cached."""
        return self.method.steps is None and not self.method.decides

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Decide for every sample whether it is reused, and mark reused ones as idle, so that the blocks skip them.

        `block` is None for a DC-DiT, whose own chunking calls this.
        """
        context = frame.context
        if context.training or self.never:
            return x, view
        indicator, position = self.indicator(context, view, x, block), context.position
        branch = self.memory.get(position, indicator.shape)
        ranks = _ranks(context, block)
        if branch is None:
            branch = BranchMemory(position.images, indicator.shape, nothing_accumulated(self.method, len(x), x.device))
            fresh, reused = [True] * len(x), [False] * len(x)
        else:
            fresh = [now != before for now, before in zip(position.images, branch.images, strict=True)]
            reused = decide(self.method, position, branch, indicator, fresh, ranks.total)
            branch.images = position.images
        branch.indicator = indicator if self.method.needs_indicator else None
        apart = ranks.tokens is not None and self.first == 0 and block is not None and splits(block.module)
        reused = self._together(context, branch, reused, ranks.all_of(reused, x.device), apart)
        if self.method.rule == "easycache":
            branch.awaited = reused, fresh
        self.memory.put(position, branch)
        starts = [x, *_streams(context, view, block)]
        if apart:
            starts = [ranks.part(start) for start in starts]
        context.slots[self.slot] = Reuse(starts[0], starts[1:], reused, fresh, branch, view)
        idle = frozenset(sample for sample, reuse in enumerate(reused) if reuse)
        context.trace.cached = idle
        return x, view.with_idle(idle)

    def indicator(self, context: CallContext, view: TokenView, x: Tensor, block: BlockCall | None) -> Tensor:
        """Compute the indicator (B, ...) that is compared from step to step.

        If nothing is compared, only the shape of the indicator matters, and it is x itself.
        """
        method, blocks = self.method, context.adapter.blocks[0] if block is None else block.site.blocks
        if method.indicator == "first_block":
            return context.slots[self.slot]  # type: ignore[no-any-return]
        if not method.needs_indicator:
            return x.detach()
        if method.rule == "easycache":
            found = main_input(context.adapter.telling(context.arguments))
            if found is None or len(found) != len(x):
                raise UnsupportedModelError("rule='easycache' compares the model's input, which has no entry a sample.")
            return found.detach().clone()  # samplers may change it in place
        if method.indicator != "input":
            named = None if block is None else block.named
            return embedding_in(method.indicator, blocks, named, context.readings.time, len(x))
        tokens = x if block is None or blocks.modulated is None else _modulated(context, blocks.modulated, block)
        return tokens.detach() if method.rule == "teacache" else _filtered(context, view, tokens, blocks).detach()

    @staticmethod
    def _together(
        context: CallContext, branch: BranchMemory, decided: list[bool], agreed: list[bool], apart: bool
    ) -> list[bool]:
        """Reuse what all processes reuse, and samples that attention couples only together.

        What is computed has accumulated nothing.

        Args:
            context: the call of the model.
            branch: the memory of the branch; `since` is updated.
            decided: for each sample, whether this process would reuse it.
            agreed: for each sample, whether all processes would.
            apart: whether the first block begins with splitting the tokens, which ties all samples together.
        """
        reused = agreed
        if any(reused) and not all(reused):
            reused = together(reused, len(reused) if apart else coupled_parts(context.model))
        if reused != decided:
            branch.since = branch.since.kept(reused)
        return reused

    def note(self, output: Any) -> None:
        """Note what the model returned, if the rule compares predictions. The call is over."""
        branch = self.memory.latest if self.method.rule == "easycache" else None
        if branch is None or branch.awaited is None:
            return
        prediction = prediction_in(output)
        if prediction is None or len(prediction) != len(branch.images):
            raise UnsupportedModelError(
                "FeatureCache(rule='easycache') compares the predictions of the model, but it returned none with an "
                "entry a sample; use another rule."
            )
        branch.note(prediction.detach().clone())  # samplers may change it in place

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Add the remembered effect to samples that are reused, and remember the new effect of the others."""
        context, state = frame.context, frame.context.slots[self.slot]
        if not isinstance(state, Reuse):
            return x, view
        context.slots[self.slot] = None
        return self._restored(context, state, 0, state.start, x), state.view

    def close_streams(self, frame: Frame, streams: Sequence[Tensor]) -> Sequence[Tensor]:
        """Do for the tokens of further streams what `close` does for the image tokens."""
        context, state = frame.context, frame.context.slots[self.slot]
        if not isinstance(state, Reuse):
            return streams
        if all(state.reused):
            streams = state.streams  # nothing has changed them
        if [stream.shape for stream in streams] != [start.shape for start in state.streams]:
            raise UnsupportedModelError(
                f"FeatureCache does not fit {type(context.model).__name__}: its blocks change other tokens beside the "
                "image tokens, which leave the last block in another shape than they enter the first; use DepthSkip."
            )
        pairs = zip(state.streams, streams, strict=True)
        return [self._restored(context, state, 1 + place, *pair) for place, pair in enumerate(pairs)]

    def _restored(self, context: CallContext, state: Reuse, stream: int, start: Tensor, x: Tensor) -> Tensor:
        """Add the remembered effect on a stream to reused samples, and remember the new effect of the others.

        Args:
            context: the call of the model.
            state: the state since the first block.
            stream: number of the stream; 0 is that of the image tokens.
            start: (B, N, D) the tokens of the stream before the blocks.
            x: (B, N, D) the tokens after the blocks, which reused samples skipped.
        """
        reused, effect = state.reused, state.branch.effects.get(stream)
        if effect is None or not all(reused):
            effect, levels = effect or Effect(self.remembering), context.levels(state.view)
            state.branch.effects[stream] = effect = effect.updated((x - start).detach(), levels, reused, state.fresh)
        context.trace.cache_bytes += effect.nbytes
        if not any(reused):
            return x
        restored = start + effect.at(context.levels(state.view) if effect.varies else (), start)
        if all(reused):
            return restored
        return torch.where(torch.tensor(reused, device=x.device).view(-1, 1, 1), restored, x)


def _ranks(context: CallContext, block: BlockCall | None) -> Ranks:
    """Return the processes that hold parts of the tokens, and those that have to decide alike."""
    agreement = context.settings.agreement
    places = (context.model,) if block is None else (context.model, block.module)
    return Ranks(token_group(*places), None if agreement is None else agreement.group)


def _modulated(context: CallContext, modulated: Callable[..., Tensor], block: BlockCall) -> Tensor:
    """Compute the modulated input of a block's attention, all its tokens."""
    context.trace.compared = context.trace.batch
    if not (is_offloaded(block.module) or hasattr(block.module, "unshard")):
        return modulated(block.module, block.named)
    with context.residency.present(block.module):
        return modulated(block.module, block.named)


def _filtered(context: CallContext, view: TokenView, tokens: Tensor, blocks: Blocks) -> Tensor:
    """Filter the generated tokens among what goes into attention (B, N, D), or text and image tokens, on their grid."""
    if blocks.image != "all" and tokens.shape[1] > view.room:
        tokens = view.split(rotate(tokens, context.rotation(blocks)), blocks)[1]
    generated = tokens.narrow(1, context.beside[0], cells(context.grid))
    context.trace.spend("FeatureCache filter", len(tokens) * filter_flops(context.grid, tokens.shape[2]))
    return sea_filter(generated, context.grid, context.level_tensor(view, tokens.device))


def _streams(context: CallContext, view: TokenView, block: BlockCall | None) -> list[Tensor]:
    """Return the tokens (B, L, D) of further streams; text in the same sequence is one if it may be used afterwards."""
    if block is None:
        return []
    blocks, named = block.site.blocks, block.named
    streams = [named[name] for name in blocks.streams]
    if not streams and (blocks.keeps_text or context.guard is not None):
        streams = [view.split(named[blocks.tokens], blocks)[0]]
    return [stream for stream in streams if stream is not None]


@dataclass(eq=False)
class FirstBlock(Bracket):
    """A bracket around the first block alone; the effect of this block is the indicator of a cache.

    Attributes:
        cache: the cache, which opens after the first block.
        slot: slot of the tokens before the block.
        compared: whether the values of the indicator matter, and not only its shape.
    """

    cache: CachedBlocks
    slot: int
    compared: bool = True
    first: int = 0
    last: int = 0

    @property
    def never(self) -> bool:
        """Whether the cache has no effect."""
        return self.cache.never

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Keep the tokens that the block gets, if the indicator is compared."""
        frame.context.slots[self.slot] = x if self.compared else None
        return x, view

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Put the effect of the block, or a tensor of its shape, into the slot of the cache."""
        context, slots = frame.context, frame.context.slots
        start = slots[self.slot]
        if self.compared and start.shape != x.shape:  # the block begins with splitting the tokens
            start = _ranks(context, None).part(start)
        slots[self.cache.slot] = (x - start if self.compared else x).detach()
        slots[self.slot] = None
        return x, view


@handles(FeatureCache)
def build(plan: Plan) -> Sequence[object]:
    """Build the cache; if the first block is the indicator, also the bracket around that block."""
    method, last = plan.method, plan.sizes.depth - 1
    if method.indicator == "first_block":
        cache = CachedBlocks(method, 1, last, plan.slot + 1)
        return [FirstBlock(cache, plan.slot, method.compares), cache]
    return [CachedBlocks(method, 0, last, plan.slot)]
