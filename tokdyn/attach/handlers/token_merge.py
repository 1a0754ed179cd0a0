"""The handler of TokenMerge: compute a sublayer on merged tokens, and copy each result to the tokens it stands for.

In every bucket of cells one token is the destination. The other tokens that are most similar to a destination are
averaged with it; each of those then gets the sublayer's result for its destination.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.coupling import check_groups
from tokdyn.adapters.tokens import join, select_following, select_samples, split
from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import Frame, Plan, Sublayer, handles
from tokdyn.attach.sites import Site
from tokdyn.attach.view import TokenView
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import TokenMerge
from tokdyn.methods.costs import matching_flops
from tokdyn.ops.destinations import Destinations, destinations, grid_destinations, staying, widths
from tokdyn.ops.keeping import check_eager, fit_mask, mask_of
from tokdyn.ops.matching import some_channels
from tokdyn.ops.merging import Merging, match, match_parts, merge, merged_away, unmerge
from tokdyn.ops.pack import packing_of
from tokdyn.ops.precision import exact
from tokdyn.ops.schedules import at
from tokdyn.ops.weighting import KeyBias, size_bias
from tokdyn.ops.windows import tiling
from tokdyn.tokens import Grid, cells
from tokdyn.trace.matchings import MatchingMemory, Matchings

Call = Callable[..., Any]
_BIAS = "key_bias"  # attention with an argument of this name adds it to the logits of its keys itself


@dataclass(eq=False)
class MergedTokens(Sublayer):
    """Merges tokens around attention, MLP or both.

    Attributes:
        method: the settings.
        first: index of the first block in which tokens are merged.
        last: index of the last.
        slot: slot of the call's `Matchings`.
        memory: matchings that later steps reuse.
    """

    method: TokenMerge
    first: int
    last: int
    slot: int
    memory: MatchingMemory = field(default_factory=MatchingMemory)

    def around(self, frame: Frame, view: TokenView, site: Site, call: Call, named: dict[str, Any]) -> Any:
        """Merge, compute and unmerge in the sublayers and blocks of the settings; elsewhere compute only."""
        wanted = site.kind != "stream" and self.method.where in (site.kind, "both")
        if not wanted or not self.first <= site.block <= self.last:
            return call(**named)
        ratio, context = self.method.ratio, frame.context
        ratios = [ratio] * view.batch if isinstance(ratio, float) else [at(ratio, x) for x in context.levels(view)]
        away: Sequence[Any] = ratios if context.settings.keep is None else self._away(context, view, ratios)
        if view.packing is not None or len(set(away)) == 1:
            return self._merged(frame, view, site, call, named, ratios)
        groups = [[i for i, other in enumerate(away) if other == count] for count in dict.fromkeys(away)]
        check_groups(context.model, site.block, groups, view.batch)
        outputs = []
        for part in map(view.take, groups):
            inside = frame._replace(view=part.view)
            arguments = select_samples(named, part.places, view.batch, site.blocks)
            outputs.append(class_swap.within(inside, self.around, inside, part.view, site, call, arguments))
        order = torch.tensor([i for places in groups for i in places], device=view.device).argsort()
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(results).index_select(0, order) for results in zip(*outputs, strict=True))
        return torch.cat(outputs).index_select(0, order)

    def steady(self, context: CallContext) -> bool:
        """Whether every call matches anew and merges as many tokens."""
        return isinstance(self.method.ratio, float) and self.method.reuse_steps == 1 and context.settings.keep is None

    def alike(self, context: CallContext, block: int) -> int:
        """Return the first block that matches, or uses a matching, as this one does; -1 where nothing is merged."""
        merges = self.first <= block <= self.last
        return self.first + self._matchings(context).enter(block - self.first, self.method.reuse) if merges else -1

    def _merged(
        self, frame: Frame, view: TokenView, site: Site, call: Call, named: dict[str, Any], ratios: Sequence[float]
    ) -> Any:
        """Merge the image tokens of all samples, compute the sublayer, and unmerge its result.

        `ratios` has the share of tokens to merge away of each sample; in a dense view all are equal.
        """
        blocks, before, packing = site.blocks, named[site.tokens], view.packing
        if packing is None and int(view.room * ratios[0]) == 0:
            frame.context.trace.fall_short("TokenMerge", (self.method.ratio,), (0,), (view.room,))
            return call(**named)
        place = (blocks.inside if site.kind == "attention" else blocks.inside_mlp) or blocks.image
        text, x = (None, before) if packing is not None or place == "all" else split(before, view.room, place)
        rows = x.reshape(-1, x.shape[-1])
        plan = self._plan(frame, view, site, rows, ratios)
        if plan is None:
            return call(**named)
        merged = merge(rows, plan)
        counts = frame.block.attention if site.kind == "attention" else frame.block.mlp
        if packing is None:
            left = len(plan.keep) // view.batch
            parts = view.samples.count(view.samples[0])
            counts.append((view.batch // parts, left * parts))
            merged = join(text, merged.view(view.batch, left, -1), place)
        else:
            counts.extend((1, length) for length in plan.lengths)
        # attention may be given its tokens a second time, as keys
        arguments = {name: merged if value is before else value for name, value in named.items()}
        arguments |= self._select_arguments(view, site, plan, named)
        weighted = self.method.weighted and site.kind == "attention"
        out = _weighted(view, site, call, arguments, plan, text, place) if weighted else call(**arguments)
        at = site.names.index(site.tokens)  # results are in the order of the arguments
        first = out[at] if isinstance(out, tuple) else out
        if packing is None:
            text, y = split(first, left, place)
            restored = unmerge(y.reshape(view.batch * left, -1), plan).view(view.batch, view.room, *y.shape[2:])
            whole = join(text, restored, place)
        else:
            whole = unmerge(first, plan)
        return (*out[:at], whole, *out[at + 1 :]) if isinstance(out, tuple) else whole

    def _select_arguments(self, view: TokenView, site: Site, plan: Merging, named: dict[str, Any]) -> dict[str, Any]:
        """Select from arguments with one entry per token the entries of the tokens that are left.

        A merged token has the entry of its destination. Returns the arguments that change, by name.
        """
        blocks, packing = site.blocks, view.packing
        if packing is not None:
            if blocks.packing not in named:
                return {}
            sample, cell = (values.index_select(0, plan.keep) for values in (packing.sample, packing.cell))
            return {blocks.packing: packing_of(plan.lengths, sample, cell, packing.grid)}
        return select_following(named, blocks, plan.keep.view(view.batch, -1).remainder(view.room), view.room)

    def _plan(self, frame: Frame, view: TokenView, site: Site, rows: Tensor, ratios: Sequence[float]) -> Merging | None:
        """Match the input (T, D) of a sublayer, or reuse an earlier block's matching; None if no token is merged."""
        context, shared = frame.context, self._matchings(frame.context)
        if self.method.reuse == 1 and not shared.steps:
            return self._match(context, view, rows, ratios)
        key = (site.kind, (site.block - self.first) // self.method.reuse, view.source, view.grid)
        return shared.plan(key, view.samples, ratios, lambda: self._match(context, view, rows, ratios))

    def _match(self, context: CallContext, view: TokenView, rows: Tensor, ratios: Sequence[float]) -> Merging | None:
        """Match the rows (T, D) by their present values; None if no token is merged."""
        if view.packing is None and any(context.beside):
            return self._match_images(context, view, rows, ratios[0])
        sizes = view.sizes if len(rows) == sum(view.sizes) else (len(rows) // view.batch,) * view.batch
        into = self._into(context, view, rows, view.grid or context.grid)
        rows = some_channels(rows, self.method.metric_width)
        merged = self._spend(context, sizes, into, ratios, rows.shape[1])
        return match(rows, sizes, into, list(ratios)) if merged else None

    def _match_images(self, context: CallContext, view: TokenView, rows: Tensor, ratio: float) -> Merging | None:
        """Match the generated tokens, and on request the tokens of each reference, among themselves."""
        images, beside = context.images, context.beside
        counts = [cells(grid) for grid in images.references]
        parts = [(beside[0], images.grid, view.generated(beside))]
        for number, grid in enumerate(images.references if self.method.references == "merge" else ()):
            at = sum(counts[:number]) if number < images.leading else view.room - sum(counts[number:])
            parts.append((at, grid, TokenView(view.samples, cells(grid), cells(grid), view.device)))
        pairs: list[tuple[Tensor, Destinations]] = []
        merged = False
        compared = some_channels(rows, self.method.metric_width)
        first = torch.arange(view.batch, device=rows.device)[:, None] * view.room
        for at, grid, part in parts:
            own = (first + torch.arange(at, at + part.room, device=rows.device)).flatten()
            values = rows.index_select(0, own) if self.method.important else rows
            into = self._into(context, part, values, grid, at, generated=not pairs)
            merged |= self._spend(context, part.sizes, into, (ratio,) * view.batch, compared.shape[1])
            pairs.append((own, into))
        return match_parts(compared, (view.room,) * view.batch, pairs, ratio) if merged else None

    def _spend(
        self, context: CallContext, sizes: Sequence[int], into: Destinations, ratios: Sequence[float], width: int
    ) -> bool:
        """Return whether any of the tokens of each sample, `sizes`, are merged; record the FLOPs of matching them."""
        merged = [merged_away(*each) for each in zip(sizes, into.stay, ratios, strict=True)]
        context.trace.fall_short("TokenMerge", ratios, merged, sizes)
        alike = len(set(zip(sizes, merged, strict=True))) == 1
        for size, count in zip(sizes, merged, strict=True):
            if count or (into.windows is not None and any(merged)):
                context.trace.spend("TokenMerge matching", matching_flops(into.pairs(size, alike), width))
        return any(merged)

    def _into(
        self, context: CallContext, view: TokenView, rows: Tensor, grid: Grid, first: int = 0, generated: bool = True
    ) -> Destinations:
        """Choose a destination in every bucket of a grid, for rows (T, D) that begin at `first` among the image tokens.

        It is the one with the largest norm, or one chosen by cell, seed and noise level once for all blocks of a call.
        Of `generated` tokens, those of the user's mask are neither destinations nor merged.
        """
        bucket, seed, important = self.method.bucket, self.method.seed, self.method.important
        known, key = self._matchings(context).destinations, (view.samples, view.source, view.grid, first)
        if not important and key in known:
            return known[key]
        windows = tiling(grid, widths(grid, bucket), self.method.window)
        step = 0 if seed is None else (context.level_tensor(view, rows.device) * 1000).round().long()
        kept = self._kept(context, view) if generated else None
        if not important and kept is None and view.index is None and view.packing is None:
            chosen = grid_destinations(view.batch, grid, rows.device, bucket, seed, step, windows)
        else:
            norms = torch.linalg.vector_norm(exact(rows.detach()), dim=1) if important else None
            cell, sample = view.rows()
            keep = None if kept is None else kept.to(rows.device)[sample, cell]
            stay = None if kept is None else self._stay(context, view, grid)
            chosen = destinations(cell, sample, view.batch, grid, bucket, seed, step, norms, windows, keep, stay)
        return chosen if important else known.setdefault(key, chosen)

    def _away(self, context: CallContext, view: TokenView, ratios: Sequence[float]) -> list[tuple[float, int]]:
        """Return the ratio of each sample, and how many of its tokens are merged beside a mask of kept ones."""
        own = view if view.grid is not None else view.generated(context.beside)
        stay = self._stay(context, own, view.grid or context.grid)
        return [(each[2], merged_away(*each)) for each in zip(own.sizes, stay, ratios, strict=True)]

    def _stay(self, context: CallContext, view: TokenView, grid: Grid) -> list[int]:
        """Count the generated tokens of each sample that are not merged, at most, without waiting for a device."""
        known, key = self._matchings(context).stay, (view.samples, view.source, view.grid)
        if key not in known:
            kept = self._kept(context, view)
            assert kept is not None
            full = view.index is None and view.packing is None
            known[key] = staying(kept, grid, self.method.bucket, full)
        return known[key]

    def _kept(self, context: CallContext, view: TokenView) -> Tensor | None:
        """Return which generated tokens of a view are kept, (b, n) bool on the host; None without a mask."""
        mask, shared = context.settings.keep, self._matchings(context)
        if mask is None:
            return None
        check_eager()
        if shared.kept is None:
            shared.kept = fit_mask(mask, context.grid, context.trace.batch)
        return mask_of(shared.kept, context.grid, view.samples, view.grid)

    def _matchings(self, context: CallContext) -> Matchings:
        """Return what the blocks of this call share; some of it is remembered for later steps."""
        shared: Matchings | None = context.slots[self.slot]
        if shared is None:
            shared, steps = Matchings(), self.method.reuse_steps
            if steps > 1 and not context.training and not torch.compiler.is_compiling():
                plans = self.memory.of(context.position, steps, context.settings.keep)
                shared = Matchings(plans, steps=context.position.steps)
            context.slots[self.slot] = shared
        return shared


def _weighted(
    view: TokenView, site: Site, call: Call, named: dict[str, Any], plan: Merging, text: Tensor | None, place: str
) -> Any:
    """Call attention with log s added to the logits of each key that stands for s tokens (arXiv 2210.09461, eq. 1).

    Args:
        view: the samples that are computed.
        site: the site of the attention.
        call: the attention.
        named: the arguments of the call, with merged tokens.
        plan: which tokens were merged.
        text: text tokens in the same sequence as the image tokens; None if there are none.
        place: where the image tokens are in that sequence, "first", "last" or "all".

    Raises:
        UnsupportedModelError: attention does not call PyTorch's scaled_dot_product_attention on these keys.
    """
    if view.packing is not None:
        return call(**named, **{_BIAS: plan.size.log()})
    blocks, count = site.blocks, 0 if text is None else text.shape[1]
    joining = [value for name, value in named.items() if blocks.text is not None and name.endswith(blocks.text)]
    count += sum(value.shape[1] for value in joining if isinstance(value, Tensor))  # text that joins within attention
    place = blocks.joint if text is None else place
    bias = size_bias(plan.size.view(view.batch, -1), count, place)
    if _BIAS in site.names:
        return call(**named, **{_BIAS: bias})
    mode = KeyBias(bias, count)
    with mode:
        out = call(**named)
    if not mode.met:
        raise UnsupportedModelError(
            f"TokenMerge(weighted=True) adds a bias to the keys of softmax attention, but the attention of block "
            f"{site.block} does not call torch.nn.functional.scaled_dot_product_attention on its {bias.shape[1]} "
            "tokens; leave weighted out, or choose an attention backend that calls this function."
        )
    return out


@handles(TokenMerge)
def build(plan: Plan) -> Sequence[object]:
    """Build the handler."""
    return [MergedTokens(plan.method, *plan.span, plan.slot)]
