"""DynamicWidth at work: gates by noise level on heads and MLP channels, and by token on the MLP.

In training, and while a model is compiled, everything is computed and multiplied by masks of 0 and 1. In sampling,
samples with the same gates are computed together on sliced weights, and the MLP gets only the tokens that chose it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.width import Kind
from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Inner, Kernel, Plan, Sublayer, handles
from tokdyn.attach.sites import Site
from tokdyn.attach.view import TokenView
from tokdyn.attach.width.layout import Layout, On
from tokdyn.attach.width.rows import (
    STREAM,
    find_layers,
    input_mask,
    into_mlp,
    note_saved,
    out_of_mlp,
    select_channels,
    select_tokens,
    token_mask,
)
from tokdyn.attach.width.slices import Slices
from tokdyn.methods import DynamicWidth, WidthGates
from tokdyn.ops.skipping import gate, gumbel_difference
from tokdyn.ops.width import flops_loss, flops_share

KINDS: tuple[Kind, Kind] = ("heads", "channels")


@dataclass
class Widths:
    """What was decided in a call, and what came of it so far.

    Attributes:
        samples: of the view that the bracket opened on, (B) places in the batch of the call.
        masks: (B, depth, H) 0 or 1 for heads and for groups of channels, where all are computed; None in sampling.
        on: what is computed for every sample in every block; None where everything is.
        spent: (block, sample, FLOPs of attention and of the MLP) as far as gates decide; a multiply-add is 2.
        shares: (block, samples, share of the tokens that the MLP saw of each).
    """

    samples: tuple[int, ...]
    masks: dict[Kind, Tensor] | None = None
    on: list[list[On | None]] = field(default_factory=list)
    spent: tuple[tuple[int, int, tuple[int, int]], ...] = ()
    shares: tuple[tuple[int, tuple[int, ...], Tensor], ...] = ()

    def places(self, samples: Sequence[int]) -> list[int]:
        """Find samples of the call among those that the bracket opened on."""
        return [self.samples.index(sample) for sample in samples]


@dataclass(eq=False)
class DynamicBlocks(Bracket, Kernel):
    """A bracket around all blocks, which decides everything once, and the kernel of each of them."""

    method: DynamicWidth
    module: WidthGates
    layouts: tuple[Layout, ...]
    last: int
    slot: int
    first: int = 0
    slices: Slices = field(default_factory=Slices)

    def forget(self) -> None:
        """Let sliced weights go."""
        self.slices.clear()

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Ask the gates."""
        context = frame.context
        masked = context.training or torch.compiler.is_compiling()
        if self.module.heads is None and self.module.channels is None:  # the noise level does not matter
            everything: list[On | None] = [None] * len(self.layouts)
            on = [everything] * view.batch
            widths = Widths(view.samples, {}) if masked else Widths(view.samples, on=on)
        elif masked:
            levels = context.level_tensor(view, x.device)
            logits = self.module(levels)
            self._spend(context, len(levels))
            drawn = {
                kind: self._draw(context, view, values)
                for kind, values in zip(KINDS, logits, strict=True)
                if values is not None
            }
            widths = Widths(view.samples, drawn)
            if context.training:
                self.slices.clear()
        else:
            self.slices.check()
            widths = Widths(view.samples, on=self._decide(context, view, x.device))
        context.slots[self.slot] = widths
        return x, view

    def _draw(self, context: CallContext, view: TokenView, logits: Tensor) -> Tensor:
        """(B, depth, H) 0 or 1, in training with a gradient; the first of each is always 1."""
        logits = logits.expand(view.batch, *logits.shape[1:])
        drawn = gate(logits, context.training, self.method.temperature)
        return torch.cat([torch.ones_like(drawn[..., :1]), drawn], dim=2)

    def _decide(self, context: CallContext, view: TokenView, device: torch.device) -> list[list[On | None]]:
        """Say what is computed for every sample in every block; samples at one level share the answer."""
        sample_levels = context.levels(view)
        levels = list(dict.fromkeys(sample_levels))
        logits = self.module(torch.tensor(levels, device=device))
        heads, channels = (None if values is None else (values > 0).tolist() for values in logits)
        self._spend(context, len(levels))
        decided: dict[float, list[On | None]] = {}
        for row, level in enumerate(levels):
            decided[level] = []
            for block, layout in enumerate(self.layouts):
                whole = [True] * len(layout.sizes["channels"])
                on = On(
                    (True, *(heads[row][block] if heads else [True] * self.module.gates)),
                    (True, *channels[row][block]) if channels else tuple(whole),
                )
                decided[level].append(None if all(on.heads) and all(on.channels) else on)
        return [decided[level] for level in sample_levels]

    def _spend(self, context: CallContext, levels: int) -> None:
        """Note what the gates of heads and channels cost."""
        context.trace.spend("DynamicWidth gates", levels * self.module.level_flops)

    def key(self, context: CallContext, view: TokenView, block: int) -> Sequence[Hashable] | None:
        """Say what is computed for every sample."""
        widths: Widths = context.slots[self.slot]
        on = [blocks[block] for blocks in widths.on]
        return on if any(on) else None

    def run(self, frame: Frame, module: nn.Module, site: Site, inner: Inner, named: dict[str, Any]) -> Any:
        """Compute the block on sliced weights, or with masks."""
        widths: Widths = frame.context.slots[self.slot]
        if widths.masks is not None:
            return self._masked(frame, module, site, widths, inner, named)
        (first,) = widths.places(frame.view.samples[:1])  # they all share it
        return self._pruned(frame, module, site, widths.on[first][site.block], inner, named)

    def _masked(
        self, frame: Frame, module: nn.Module, site: Site, widths: Widths, inner: Inner, named: dict[str, Any]
    ) -> Any:
        """Compute the block with masks; what it costs is noted for the loss."""
        assert widths.masks is not None
        samples, device, given = frame.view.samples, named[site.blocks.tokens].device, frame.exchange.given
        rows = None if samples == widths.samples else torch.tensor(widths.places(samples), device=device)
        for kind, mask in widths.masks.items():
            given[kind] = mask[:, site.block] if rows is None else mask[:, site.block].index_select(0, rows)
        if frame.context.training and self.module.tokens is not None:
            given["noise"] = gumbel_difference(torch.empty(len(samples), frame.block.tokens, device=device))
        layout = self.layouts[site.block]
        find_layers(frame, module, site, layout)
        out = inner(named)
        lengths = frame.block.rows or (frame.block.tokens,) * len(samples)
        widths.spent += tuple(
            (site.block, sample, layout.flops(length, frame.block.text))
            for sample, length in zip(samples, lengths, strict=True)
        )
        widths.shares += tuple((site.block, some, share) for some, share in frame.exchange.returned.items())
        return out

    def _pruned(
        self, frame: Frame, module: nn.Module, site: Site, on: On | None, inner: Inner, named: dict[str, Any]
    ) -> Any:
        """Compute the block for samples with the same gates, on sliced weights if it can be sliced."""
        layout = self.layouts[site.block]
        find_layers(frame, module, site, layout, only_tokens=True)
        if on is None:
            return inner(named)
        pruned = self.slices.pruned(site.block, module, layout, on, frame.sites)
        if pruned is None:
            find_layers(frame, module, site, layout)
            device = named[site.blocks.tokens].device
            masks = {kind: torch.tensor([on.of(kind)], device=device).float() for kind in KINDS if on.of(kind)}
            frame.exchange.given.update({str(kind): mask for kind, mask in masks.items()})
            return inner(named)
        copy, slices = pruned
        frame.block.heads = sum(on.heads) / len(on.heads)
        if on.channels:
            frame.block.channels = slices.sizes["channels"] / layout.total("channels")
        if slices.columns is not None:
            for name in layout.width.tables:
                if named.get(name) is not None:
                    named = {**named, name: select_channels(named[name], slices.columns)}
        out = copy(**named)
        note_saved(frame, site, layout, slices)
        return out

    def layer(
        self, frame: Frame, module: nn.Module, site: Site, call: Callable[..., Any], x: Tensor, *rest: Any
    ) -> Tensor:
        """Compute a layer with masked inputs, or on the rows of the tokens that the MLP sees."""
        layer, layout = site.layer, self.layouts[site.block]
        assert layer is not None
        if layer.out and self.module.tokens is None:
            return call(x, *rest)  # type: ignore[no-any-return]
        if layer.out:
            return into_mlp(self.module, self.method.temperature, frame, module, site, call, x, *rest)
        mask = input_mask(frame, layer, layout, x)
        if mask is not None:
            x = x * mask
        if layer.split:
            return out_of_mlp(frame, module, layer, call, x, *rest)
        out: Tensor = call(x, *rest)
        return out

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Add the FLOPs loss."""
        context = frame.context
        widths: Widths | None = context.slots[self.slot]
        if widths is None:  # no sample was computed
            return x, view
        context.slots[self.slot] = None
        if context.training and widths.masks is not None:
            loss = flops_loss(self._share(widths, x.device), self.module.target(self.method))
            context.add_loss("DynamicWidth", self.method.loss_weight * loss)
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:  # else it is recomputed
                self.module.calls += 1
        return x, view

    def _share(self, widths: Widths, device: torch.device) -> Tensor:
        """(B,) share of the FLOPs that were spent, of the blocks that ran."""
        depth = len(self.layouts)
        batch = len(widths.samples)
        spent = [[[0.0] * depth for _ in range(batch)] for _ in range(2)]
        for block, sample, flops in widths.spent:
            (place,) = widths.places([sample])
            spent[0][place][block], spent[1][place][block] = flops
        attention, mlp = torch.tensor(spent, dtype=torch.float32, device=device)
        ones = torch.ones(batch, depth, device=device)
        assert widths.masks is not None
        heads = widths.masks["heads"].mean(dim=2) if "heads" in widths.masks else ones
        channels = ones
        if "channels" in widths.masks:
            sizes = torch.tensor([layout.sizes["channels"] for layout in self.layouts], device=device)
            channels = (widths.masks["channels"] * sizes / sizes.sum(dim=1, keepdim=True)).sum(dim=2)
        tokens = list(ones.unbind(dim=1))
        for block, samples, share in widths.shares:
            rows = torch.tensor(widths.places(samples), device=device)
            tokens[block] = tokens[block].index_copy(0, rows, share.to(tokens[block]))
        return flops_share(heads, channels, torch.stack(tokens, dim=1), attention, mlp)


@dataclass(eq=False)
class TokenChoice(Sublayer):
    """Around the MLP of a block: only the tokens that choose it go in.

    Where gates see the tokens before norm and modulation, it also notes those as they pass.
    """

    blocks: DynamicBlocks

    def around(self, frame: Frame, view: TokenView, site: Site, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Compute the MLP of the tokens that choose it; the others get 0."""
        method, gates = self.blocks.method, self.blocks.module
        if site.kind == "stream" and method.token_input == "stream":
            frame.exchange.given[STREAM] = next(iter(named.values()))
        if site.kind != "mlp":
            return call(**named)
        name = site.names[0]
        if frame.context.training or torch.compiler.is_compiling():
            mask = token_mask(gates, frame, site, named[name], method.temperature)
            return call(**named) * mask[..., None].to(named[name].dtype)
        return select_tokens(gates, frame, site, named[name], lambda x: call(**{**named, name: x}))


@handles(DynamicWidth)
def build(plan: Plan) -> Sequence[object]:
    """Build bracket and kernel, and the choice of tokens; nothing where everything stays on."""
    if plan.module is None:
        return []
    blocks = DynamicBlocks(plan.method, plan.module, plan.layouts, plan.sizes.depth - 1, plan.slot)
    return [blocks, TokenChoice(blocks)] if plan.method.tokens else [blocks]
