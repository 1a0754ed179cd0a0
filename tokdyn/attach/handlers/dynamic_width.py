"""DynamicWidth at work: gates by noise level on heads and MLP channels, and by token on the MLP.

In training, and while a model is compiled, everything is computed and what is off is multiplied by 0. In sampling,
samples with the same gates are computed together on sliced weights, and the MLP gets the tokens that are on.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.width import Kind
from tokdyn.attach.handlers.base import Inner
from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role
from tokdyn.attach.width.layers import columns, factor, know_layers, note_saved
from tokdyn.attach.width.layout import Layout, On
from tokdyn.attach.width.rows import STREAM, chosen, into_mlp, out_of_mlp, selected
from tokdyn.attach.width.slices import Slices
from tokdyn.methods import DynamicWidth, WidthGates
from tokdyn.ops.skipping import gate, gumbel_difference
from tokdyn.ops.width import flops_loss, flops_share

KINDS: tuple[Kind, Kind] = ("heads", "channels")


@dataclass(frozen=True)
class Widths:
    """What was decided in a call, and what came of it so far.

    Attributes:
        batch: B.
        masks: (B, depth, H) 0 or 1 for heads and for groups of channels, where all are computed; None in sampling.
        on: what is on for every sample in every block; None where everything is.
        ran: block, sample, and FLOPs of attention and of the MLP, as far as gates decide.
        shares: block, samples, and for each the share of the tokens that the MLP saw.
    """

    batch: int
    masks: dict[Kind, Tensor] | None = None
    on: list[list[On | None]] = field(default_factory=list)
    ran: tuple[tuple[int, int, tuple[int, int]], ...] = ()
    shares: tuple[tuple[int, tuple[int, ...], Tensor], ...] = ()


@dataclass(frozen=True)
class Narrowing:
    """A bracket around all blocks, within which everything is decided once, and a kernel for each of them."""

    method: DynamicWidth
    module: WidthGates
    last: int
    first: int = 0
    slices: Slices = field(default_factory=Slices)

    def forget(self) -> None:
        """Let sliced weights go."""
        self.slices.clear()

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Ask the gates."""
        if self.module.heads is None and self.module.channels is None:  # the noise level is of no matter
            nothing: list[On | None] = [None] * len(run.attachment.layouts)
            masked = run.training or torch.compiler.is_compiling()
            widths = Widths(run.batch, {}) if masked else Widths(run.batch, on=[nothing] * run.batch)
        elif run.training or torch.compiler.is_compiling():
            clock = run.clock(x.device)
            logits = self.module(clock)
            self._spend(run, len(clock))
            drawn = {kind: self._drawn(run, each) for kind, each in zip(KINDS, logits, strict=True) if each is not None}
            widths = Widths(run.batch, drawn)
            if run.training:
                self.slices.clear()
        else:
            self.slices.check()
            widths = Widths(run.batch, on=self._decided(run, x.device))
        run.kept[id(self)] = widths
        return x

    def _drawn(self, run: Run, logits: Tensor) -> Tensor:
        """(B, depth, H) 0 or 1, in training with a gradient; the first of each is always on."""
        logits = logits.expand(run.batch, *logits.shape[1:])
        drawn = gate(logits, run.training, self.method.temperature)
        return torch.cat([torch.ones_like(drawn[..., :1]), drawn], dim=2)

    def _decided(self, run: Run, device: torch.device) -> list[list[On | None]]:
        """What is on for every sample in every block; samples at one level share the answer."""
        levels = list(dict.fromkeys(run.level))
        logits = self.module(torch.tensor(levels, device=device))
        heads, channels = (None if each is None else (each > 0).tolist() for each in logits)
        self._spend(run, len(levels))
        known: dict[float, list[On | None]] = {}
        for row, level in enumerate(levels):
            known[level] = []
            for block, layout in enumerate(run.attachment.layouts):
                whole = [True] * len(layout.sizes["channels"])
                on = On(
                    (True, *(heads[row][block] if heads else [True] * self.module.gates)),
                    (True, *channels[row][block]) if channels else tuple(whole),
                )
                known[level].append(None if all(on.heads) and all(on.channels) else on)
        return [known[level] for level in run.level]

    def _spend(self, run: Run, levels: int) -> None:
        """Note what the gates of heads and channels cost."""
        run.record.spend("DynamicWidth gates", levels * self.module.level_flops)

    def key(self, run: Run, block: int) -> Sequence[Hashable] | None:
        """What is on for every sample."""
        widths: Widths = run.kept[id(self)]
        on = [each[block] for each in widths.on]
        return on if any(on) else None

    def around(self, run: Run, part: nn.Module, role: Role, inner: Inner) -> Inner:
        """The block with what is on alone, or with masks."""
        widths: Widths = run.kept[id(self)]
        layout = run.attachment.layouts[role.block]

        def compute(named: dict[str, Any]) -> Any:
            before = run.given, run.whose, run.words, run.found
            run.given, run.whose, run.words, run.found = {}, run.samples, run.call.text, {}
            try:
                if widths.masks is None:
                    on = widths.on[run.samples[0]][role.block]
                    return self._narrow(run, part, role, layout, on, inner, named)
                return self._masked(run, part, role, layout, widths, inner, named)
            finally:
                run.given, run.whose, run.words, run.found = before

        return compute

    def _masked(
        self,
        run: Run,
        part: nn.Module,
        role: Role,
        layout: Layout,
        widths: Widths,
        inner: Inner,
        named: dict[str, Any],
    ) -> Any:
        """The block with masks for some samples; what it costs is noted for the loss."""
        assert widths.masks is not None
        samples, device = run.samples, named[role.stack.tokens].device
        rows = None if len(samples) == widths.batch else torch.tensor(samples, device=device)
        for kind, mask in widths.masks.items():
            run.given[kind] = mask[:, role.block] if rows is None else mask[:, role.block].index_select(0, rows)
        if run.training and self.module.tokens is not None:
            run.given["noise"] = gumbel_difference(torch.empty(len(samples), run.call.tokens, device=device))
        know_layers(run, part, role, layout)
        out = inner(named)
        lengths = run.call.rows or (run.call.tokens,) * len(samples)
        ran = tuple(
            (role.block, sample, layout.flops(length, run.call.text))
            for sample, length in zip(samples, lengths, strict=True)
        )
        shares = tuple((role.block, some, share) for some, share in run.found.items())
        now: Widths = run.kept[id(self)]
        run.kept[id(self)] = replace(now, ran=now.ran + ran, shares=now.shares + shares)
        return out

    def _narrow(
        self, run: Run, part: nn.Module, role: Role, layout: Layout, on: On | None, inner: Inner, named: dict[str, Any]
    ) -> Any:
        """The block for samples with the same gates, on sliced weights if that can be."""
        know_layers(run, part, role, layout, rows=True)
        if on is None:
            return inner(named)
        found = self.slices.narrow(role.block, part, layout, on, run.roles)
        if found is None:
            know_layers(run, part, role, layout)
            device = named[role.stack.tokens].device
            run.given |= {kind: torch.tensor([on.of(kind)], device=device).float() for kind in KINDS if on.of(kind)}
            return inner(named)
        narrow, taken = found
        run.call.heads = sum(on.heads) / len(on.heads)
        if on.channels:
            run.call.channels = taken.sizes["channels"] / layout.total("channels")
        if taken.columns is not None:
            for name in layout.width.tables:
                if named.get(name) is not None:
                    named = {**named, name: columns(named[name], taken.columns)}
        out = narrow(**named)
        note_saved(run, layout, taken)
        return out

    def layer(self, run: Run, part: nn.Module, role: Role, call: Callable[..., Any], x: Tensor, *args: Any) -> Tensor:
        """A layer whose inputs are masked, or that sees the rows of the tokens that are on."""
        layer, layout = role.layer, run.attachment.layouts[role.block]
        assert layer is not None
        if layer.out and self.module.tokens is None:
            return call(x, *args)  # type: ignore[no-any-return]
        if layer.out:
            return into_mlp(self.module, self.method.temperature, run, part, role, call, x, *args)
        mask = factor(run, layer, layout, x)
        if mask is not None:
            x = x * mask
        if layer.split:
            return out_of_mlp(run, part, layer, call, x, *args)
        out: Tensor = call(x, *args)
        return out

    def close(self, run: Run, x: Tensor) -> Tensor:
        """The FLOPs loss."""
        if id(self) not in run.kept:  # all samples repeat what the blocks did before
            return x
        widths: Widths = run.kept.pop(id(self))
        if run.training and widths.masks is not None:
            loss = flops_loss(self._share(run, widths, x.device), self.module.target(self.method))
            run.add_loss("DynamicWidth", self.method.loss_weight * loss)
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:  # else it is computed again
                self.module.calls += 1
        return x

    def _share(self, run: Run, widths: Widths, device: torch.device) -> Tensor:
        """(B,) share of the FLOPs that ran, of the blocks that did."""
        layouts = run.attachment.layouts
        depth = len(layouts)
        spent = [[[0.0] * depth for _ in range(widths.batch)] for _ in range(2)]
        for block, sample, flops in widths.ran:
            spent[0][sample][block], spent[1][sample][block] = flops
        attention, mlp = torch.tensor(spent, dtype=torch.float32, device=device)
        ones = torch.ones(widths.batch, depth, device=device)
        assert widths.masks is not None
        heads = widths.masks["heads"].mean(dim=2) if "heads" in widths.masks else ones
        channels = ones
        if "channels" in widths.masks:
            sizes = torch.tensor([layout.sizes["channels"] for layout in layouts], device=device)
            channels = (widths.masks["channels"] * sizes / sizes.sum(dim=1, keepdim=True)).sum(dim=2)
        tokens = list(ones.unbind(dim=1))
        for block, samples, share in widths.shares:
            rows = torch.tensor(samples, device=device)
            tokens[block] = tokens[block].index_copy(0, rows, share.to(tokens[block]))
        return flops_share(heads, channels, torch.stack(tokens, dim=1), attention, mlp)


@dataclass(frozen=True)
class Choosing:
    """Around the MLP of a block: only the tokens that are on go in.

    Where gates see the tokens before norm and modulation, it also notes those as they pass.
    """

    narrowing: Narrowing

    def around(self, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """The MLP of the tokens that are on, and 0 for the others."""
        if role.kind == "stream" and self.narrowing.method.token_input == "stream":
            run.given[STREAM] = next(iter(named.values()))
        if role.kind != "mlp":
            return call(**named)
        name = role.names[0]
        if run.training or torch.compiler.is_compiling():
            factor = chosen(self.narrowing.module, run, role, named[name], self.narrowing.method.temperature)
            return call(**named) * factor[..., None].to(named[name].dtype)
        return selected(self.narrowing.module, run, role, named[name], lambda x: call(**{**named, name: x}))
