"""The handlers of DynamicWidth: compute some heads and MLP channels, and run the MLP on some tokens.

Which heads and groups of MLP channels are on depends on the noise level, and which tokens go through the MLP on the
tokens themselves. In training, and while a model is compiled, everything is computed and multiplied by masks of 0 and
1. In sampling, samples with the same gates are computed together on sliced weights, and the MLP gets the selected
tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.counting import text_stream
from tokdyn.adapters.tokens import call_by_name
from tokdyn.adapters.width import Kind
from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Inner, Kernel, Plan, Sublayer, handles
from tokdyn.attach.sites import Site, attach_layers
from tokdyn.attach.view import TokenView
from tokdyn.attach.width.layout import Layout, On
from tokdyn.attach.width.rows import (
    STREAM,
    input_mask,
    into_mlp,
    note_reach,
    note_saved,
    out_of_mlp,
    select_tokens,
    token_mask,
)
from tokdyn.attach.width.slices import Slices, select_channels
from tokdyn.methods import DynamicWidth, WidthGates
from tokdyn.methods.drawing import gate_noise, over_batch
from tokdyn.ops.skipping import gate
from tokdyn.ops.width import flops_loss, flops_share

KINDS: tuple[Kind, Kind] = ("heads", "channels")


@dataclass
class Widths:
    """The gates of one call, and in training what they cost so far.

    Attributes:
        samples: positions in the batch of the B samples of the view that the bracket opened on.
        masks: (B, depth, H) of 0 and 1 for heads and for groups of MLP channels, if all are computed; None in sampling.
        on: in sampling, for every sample and block, the heads and groups of channels to compute; None for a block that
            is computed in full.
        spent: with masks, (block, sample, (FLOPs of attention, FLOPs of the MLP)), counting the layers that gates
            decide about as if all were on; a multiply-add is 2.
        shares: with masks, (block, samples, (b,) share of the tokens of each sample that went through the MLP).
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
    """A bracket around all blocks, which computes the gates once, and the kernel that computes each block by them.

    Attributes:
        method: the settings.
        module: the trained gates.
        layouts: of each block, which outputs and inputs of its layers belong to which head and channel.
        last: index of the last block of the model.
        slot: slot of the call's `Widths`.
        slices: the sliced weights.
    """

    method: DynamicWidth
    module: WidthGates
    layouts: tuple[Layout, ...]
    last: int
    slot: int
    first: int = 0
    slices: Slices = field(default_factory=Slices)

    def forget(self) -> None:
        """Drop the sliced weights."""
        self.slices.clear()

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Compute the gates of all blocks. The tokens stay as they are."""
        context = frame.context
        masked = context.training or torch.compiler.is_compiling()
        if self.module.heads is None and self.module.channels is None:  # the noise level does not matter
            everything: list[On | None] = [None] * len(self.layouts)
            widths = Widths(view.samples, {}) if masked else Widths(view.samples, on=[everything] * view.batch)
        elif masked:
            levels = context.level_tensor(view, x.device)
            logits = self.module(levels)
            self._spend(context, len(levels))
            drawn = {
                kind: self._draw(context, view, kind, values)
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

    def _draw(self, context: CallContext, view: TokenView, kind: Kind, logits: Tensor) -> Tensor:
        """Draw masks (B, depth, H) of 0 and 1, in training with a gradient, from logits (B or 1, depth, H - 1).

        The first head or group of each block has no gate and is always 1.
        """
        logits = logits.expand(view.batch, *logits.shape[1:])
        training, purpose = context.training, KINDS.index(kind)
        noise = gate_noise(training, view.samples, logits.shape[1:], logits.device, self.slot, purpose)
        drawn = gate(logits, training, self.method.temperature, noise)
        return torch.cat([torch.ones_like(drawn[..., :1]), drawn], dim=2)

    def _decide(self, context: CallContext, view: TokenView, device: torch.device) -> list[list[On | None]]:
        """Compute `Widths.on`. Samples at the same noise level share one list."""
        sample_levels = context.levels(view)
        levels = list(dict.fromkeys(sample_levels))
        logits = self.module(torch.tensor(levels, device=device))
        heads, channels = (None if values is None else (values > 0).tolist() for values in logits)
        self._spend(context, len(levels))
        decided: dict[float, list[On | None]] = {}
        for row, level in enumerate(levels):
            decided[level] = []
            for block, layout in enumerate(self.layouts):
                all_channels = [True] * len(layout.sizes["channels"])
                on = On(
                    (True, *(heads[row][block] if heads else [True] * self.module.gates)),
                    (True, *channels[row][block]) if channels else tuple(all_channels),
                )
                decided[level].append(None if all(on.heads) and all(on.channels) else on)
        return [decided[level] for level in sample_levels]

    def _spend(self, context: CallContext, levels: int) -> None:
        """Record the FLOPs of the gates of heads and channels at a number of noise levels."""
        context.trace.spend("DynamicWidth gates", levels * self.module.level_flops)

    def key(self, context: CallContext, view: TokenView, block: int) -> Sequence[Hashable] | None:
        """Return for every sample the heads and channels to compute; None if everything is computed."""
        widths: Widths = context.slots[self.slot]
        return on if any(on := [blocks[block] for blocks in widths.on]) else None

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
        """Compute the block with masks, and add its cost to `widths` for the FLOPs loss."""
        assert widths.masks is not None
        samples, device, given = frame.view.samples, named[site.blocks.tokens].device, frame.exchange.given
        rows = None if samples == widths.samples else torch.tensor(widths.places(samples), device=device)
        for kind, mask in widths.masks.items():
            given[kind] = mask[:, site.block] if rows is None else mask[:, site.block].index_select(0, rows)
        if frame.context.training and self.module.tokens is not None:
            given["noise"] = gate_noise(True, samples, (frame.block.tokens,), device, self.slot, 2 + site.block)
        layout = self.layouts[site.block]
        attach_layers(frame.sites, module, site, layout)
        out = inner(named)
        lengths = frame.block.rows or (frame.block.tokens,) * len(samples)
        rest = frame.block.text, text_stream(frame.block, site.blocks), frame.context.parts(site.blocks)[0]
        spent = ((sample, layout.flops(length, *rest)) for sample, length in zip(samples, lengths, strict=True))
        widths.spent += tuple((site.block, sample, flops) for sample, flops in spent)
        widths.shares += tuple((site.block, some, share) for some, share in frame.exchange.returned.items())
        return out

    def _pruned(
        self, frame: Frame, module: nn.Module, site: Site, on: On | None, inner: Inner, named: dict[str, Any]
    ) -> Any:
        """Compute the block for samples with the same gates, on sliced weights if it can be sliced, else with masks."""
        layout = self.layouts[site.block]
        attach_layers(frame.sites, module, site, layout, only_tokens=True)
        if on is None:
            return inner(named)
        pruned = self.slices.pruned(site.block, module, layout, on, frame.sites)
        if pruned is None:
            attach_layers(frame.sites, module, site, layout)
            device = named[site.blocks.tokens].device
            masks = {kind: torch.tensor([on.of(kind)], device=device).float() for kind in KINDS if on.of(kind)}
            frame.exchange.given.update({str(kind): mask for kind, mask in masks.items()})
            return inner(named)
        copy, slices = pruned
        frame.block.heads = sum(on.heads) / len(on.heads)
        if on.channels:
            frame.block.channels = slices.sizes["channels"] / layout.total("channels")
        if slices.columns is not None:
            for name in (name for name in layout.width.tables if named.get(name) is not None):
                named = {**named, name: select_channels(named[name], slices.columns)}
        out = call_by_name(copy, site.blocks, (), tuple(named), frame.context.readings.images, named)
        note_saved(frame, site, layout, slices)
        return out

    def layer(
        self, frame: Frame, module: nn.Module, site: Site, call: Callable[..., Any], x: Tensor, *rest: Any
    ) -> Tensor:
        """Compute a layer with masked inputs, or on the tokens that go through the MLP."""
        layer, layout = site.layer, self.layouts[site.block]
        assert layer is not None
        if layer.out and self.module.tokens is None:
            return call(x, *rest)  # type: ignore[no-any-return]
        if layer.out:
            return into_mlp(self.module, self.method.temperature, frame, module, site, call, x, *rest)
        mask = input_mask(frame, site, layout, x)
        if mask is not None:
            x = x * mask
        if layer.split:
            return out_of_mlp(frame, module, layer, call, x, *rest)
        return call(x, *rest)  # type: ignore[no-any-return]

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Add the FLOPs loss in training. The tokens stay as they are."""
        context, widths = frame.context, frame.context.slots[self.slot]
        if widths is None:  # no sample was computed
            return x, view
        context.slots[self.slot] = None
        if context.training and widths.masks is not None:
            loss = flops_loss(self._share(widths, x.device), self.module.target(self.method))
            context.add_loss("DynamicWidth", self.method.loss_weight * loss)
            note_reach(context.trace, self.method, self.module, self.layouts, widths.spent)
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:  # else it is recomputed
                self.module.calls += 1
        return x, view

    def _share(self, widths: Widths, device: torch.device) -> Tensor:
        """Compute the FLOPs (B,) that the blocks which ran spent, as a share of their FLOPs without gates."""
        depth, batch = len(self.layouts), len(widths.samples)
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
        return over_batch("DynamicWidth", flops_share(heads, channels, torch.stack(tokens, dim=1), attention, mlp))


@dataclass(eq=False)
class TokenChoice(Sublayer):
    """Runs the MLP of a block on the tokens that its gate selects; the MLP adds nothing to the others.

    With `token_input="stream"` the gate reads the tokens before norm and modulation. This handler then also sees them
    on their way to the norm, and keeps them until the MLP is called.

    Attributes:
        blocks: the bracket and kernel of the same method.
    """

    blocks: DynamicBlocks

    def around(self, frame: Frame, view: TokenView, site: Site, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Compute the MLP of the selected tokens, and 0 for the others. Attention is computed unchanged."""
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
    """Build the bracket and kernel, and the handler of the MLP if tokens have gates; nothing if nothing has gates."""
    if plan.module is None:
        return []
    blocks = DynamicBlocks(plan.method, plan.module, plan.layouts, plan.sizes.depth - 1, plan.slot)
    return [blocks, TokenChoice(blocks)] if plan.method.tokens else [blocks]
