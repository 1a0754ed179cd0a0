"""TokenMerge at work: a sublayer sees merged tokens, and every token gets the result of the one it was merged into."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.tokens import follow, join, of_samples, split
from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import Frame, Plan, Sublayer, handles
from tokdyn.attach.sites import Site
from tokdyn.attach.view import TokenView
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import TokenMerge
from tokdyn.methods.costs import matching_flops
from tokdyn.ops.destinations import Destinations, destinations, grid_destinations
from tokdyn.ops.merging import Merging, joined, match, merge, merged_away, unmerge
from tokdyn.ops.pack import packing_of
from tokdyn.ops.schedules import at
from tokdyn.ops.weighting import KeyBias, size_bias

_BIAS = "key_bias"  # attention with an argument of this name adds it to the logits of its keys itself


@dataclass
class Matchings:
    """What blocks of a call share.

    Attributes:
        destinations: that depend on cells and noise level alone, by the view.
        plans: for each sample a matching and its place in it, by sublayer, window of blocks and tokens.
    """

    destinations: dict[Hashable, Destinations] = field(default_factory=dict)
    plans: dict[Hashable, dict[int, tuple[Merging, int]]] = field(default_factory=dict)


@dataclass(eq=False)
class MergedTokens(Sublayer):
    """Around attention, MLP or both, in the blocks `first` to `last`."""

    method: TokenMerge
    first: int
    last: int
    slot: int

    def around(self, frame: Frame, view: TokenView, site: Site, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Merge, compute, unmerge."""
        wanted = site.kind != "stream" and self.method.where in (site.kind, "both")
        if not wanted or not self.first <= site.block <= self.last:
            return call(**named)
        ratio = self.method.ratio
        if isinstance(ratio, float):
            return self._merged(frame, view, site, call, named, [ratio] * view.batch)
        ratios = [at(ratio, level) for level in frame.context.levels(view)]
        if view.packing is not None or len(set(ratios)) == 1:
            return self._merged(frame, view, site, call, named, ratios)
        return self._by_ratio(frame, view, site, call, named, ratios)

    def _by_ratio(
        self,
        frame: Frame,
        view: TokenView,
        site: Site,
        call: Callable[..., Any],
        named: dict[str, Any],
        ratios: Sequence[float],
    ) -> Any:
        """Compute samples that merge equally much together, and the others apart."""
        groups = [[i for i, found in enumerate(ratios) if found == ratio] for ratio in dict.fromkeys(ratios)]
        outputs = []
        for places in groups:
            part = view.take(places)
            inside = replace(frame, view=part.view)
            given = of_samples(named, part.places, view.batch, site.blocks)
            outputs.append(class_swap.within(inside, self.around, inside, part.view, site, call, given))
        order = torch.tensor([i for places in groups for i in places], device=view.device).argsort()
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(each).index_select(0, order) for each in zip(*outputs, strict=True))
        return torch.cat(outputs).index_select(0, order)

    def _merged(
        self,
        frame: Frame,
        view: TokenView,
        site: Site,
        call: Callable[..., Any],
        named: dict[str, Any],
        ratios: Sequence[float],
    ) -> Any:
        """Merge the image tokens of all samples, each by its ratio, which is the same for all in a dense view."""
        blocks, before, packing = site.blocks, named[site.names[0]], view.packing
        if packing is None and int(view.room * ratios[0]) == 0:
            return call(**named)
        place = (blocks.inside if site.kind == "attention" else blocks.inside_mlp) or blocks.image
        text, x = (None, before) if packing is not None or place == "all" else split(before, view.room, place)
        rows = x.reshape(-1, x.shape[-1])
        plan = self._plan(frame, view, site, rows, ratios)
        if plan is None:
            return call(**named)
        merged = merge(rows, plan)
        seen = frame.block.attention if site.kind == "attention" else frame.block.mlp
        if packing is None:
            left = len(plan.keep) // view.batch
            seen.append((view.batch, left))
            merged = join(text, merged.view(view.batch, left, -1), place)
        else:
            seen.extend((1, length) for length in plan.lengths)
        # attention may be given its tokens a second time, as keys
        given = {name: merged if value is before else value for name, value in named.items()}
        given |= self._followed(view, site, plan, named)
        weighted = self.method.weighted and site.kind == "attention"
        out = _weighted(view, site, call, given, plan, text, place) if weighted else call(**given)
        first, *rest = out if isinstance(out, tuple) else (out,)
        if packing is None:
            text, y = split(first, left, place)
            restored = unmerge(y.reshape(-1, y.shape[-1]), plan).view(view.batch, view.room, -1)
            whole = join(text, restored, place)
        else:
            whole = unmerge(first, plan)
        return (whole, *rest) if isinstance(out, tuple) else whole

    def _followed(self, view: TokenView, site: Site, plan: Merging, named: dict[str, Any]) -> dict[str, Any]:
        """Bring arguments that follow the tokens to the merged ones, which lie where their destinations do."""
        blocks, packing = site.blocks, view.packing
        if packing is not None:
            if blocks.packing not in named:
                return {}
            sample, cell = (values.index_select(0, plan.keep) for values in (packing.sample, packing.cell))
            return {blocks.packing: packing_of(plan.lengths, sample, cell, packing.grid)}
        following = [how for how in blocks.follow if named.get(how.name) is not None]
        if not following:
            return {}
        first = torch.arange(view.batch, device=plan.keep.device)[:, None] * view.room
        kept = plan.keep.view(view.batch, -1) - first
        followed: dict[str, Any] = {}
        for how in following:  # an argument may follow along two axes
            followed[how.name] = follow(followed.get(how.name, named[how.name]), how, blocks, kept, view.room)
        return followed

    def _plan(self, frame: Frame, view: TokenView, site: Site, rows: Tensor, ratios: Sequence[float]) -> Merging | None:
        """Find what the samples of a view merge, or take it over from an earlier block; None if nothing merges.

        Args:
            frame: of the block.
            view: the samples that are computed.
            site: of the sublayer.
            rows: (T, D), its input.
            ratios: share of the tokens to merge away, for each sample.
        """
        if self.method.reuse == 1:
            return self._match(frame.context, view, rows, ratios)
        key = (site.kind, (site.block - self.first) // self.method.reuse, view.source)
        plans = self._matchings(frame.context).plans.setdefault(key, {})
        new = [place for place, sample in enumerate(view.samples) if sample not in plans]
        if new:  # samples that skipped the block in which others were matched
            plan = self._match(frame.context, view, rows, ratios)
            if plan is None:
                return None
            plans.update({view.samples[place]: (plan, place) for place in new})
        chosen = [plans[sample] for sample in view.samples]
        one = chosen[0][0]
        if len(one.lengths) == view.batch and all(plan is one and place == i for i, (plan, place) in enumerate(chosen)):
            return one
        return joined([plan.sample(place) for plan, place in chosen])

    def _match(self, context: CallContext, view: TokenView, rows: Tensor, ratios: Sequence[float]) -> Merging | None:
        """Match the rows as they are now."""
        sizes = view.sizes if len(rows) == sum(view.sizes) else (len(rows) // view.batch,) * view.batch
        choose = self._important if self.method.important else self._fixed
        into = choose(context, view, rows)
        buckets = into.table.shape[1]
        gone = [merged_away(size, buckets, ratio) for size, ratio in zip(sizes, ratios, strict=True)]
        if not any(gone):
            return None
        alike = into.others is not None and len(set(gone)) == 1
        for size in (size for size, away in zip(sizes, gone, strict=True) if away):
            context.trace.spend("TokenMerge matching", matching_flops(size, buckets, alike, rows.shape[1]))
        return match(rows, sizes, into, ratios[0] if len(set(ratios)) == 1 else list(ratios))

    def _fixed(self, context: CallContext, view: TokenView, rows: Tensor) -> Destinations:
        """Choose destinations by cell and noise level alone, once for all blocks of a call."""
        known, key = self._matchings(context).destinations, (view.samples, view.source)
        device = rows.device
        if key in known:
            return known[key]
        step: int | Tensor = 0
        if self.method.seed is not None:
            step = (context.level_tensor(view, device) * 1000).round().long()
        bucket, seed = self.method.bucket, self.method.seed
        if view.index is None and view.packing is None:
            chosen = grid_destinations(view.batch, context.grid, device, bucket, seed, step)
        else:
            chosen = destinations(*view.rows(), view.batch, context.grid, bucket, seed, step)
        known[key] = chosen
        return chosen

    def _important(self, context: CallContext, view: TokenView, rows: Tensor) -> Destinations:
        """Choose the longest row of every bucket."""
        length = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        return destinations(*view.rows(), view.batch, context.grid, self.method.bucket, importance=length)

    def _matchings(self, context: CallContext) -> Matchings:
        """What blocks of this call share."""
        if context.slots[self.slot] is None:
            context.slots[self.slot] = Matchings()
        found: Matchings = context.slots[self.slot]
        return found


def _weighted(
    view: TokenView,
    site: Site,
    call: Callable[..., Any],
    named: dict[str, Any],
    plan: Merging,
    text: Tensor | None,
    place: str,
) -> Any:
    """Let a merged token count in attention as often as it stands for tokens (arXiv 2210.09461, eq. 1).

    Args:
        view: the samples.
        site: of the attention.
        call: the attention.
        named: its arguments.
        plan: what was merged.
        text: tokens that lie beside those of the image in the same sequence.
        place: where image tokens lie in it.
    """
    if view.packing is not None:
        return call(**named, **{_BIAS: plan.size.log()})
    beside = text
    if text is None:  # text tokens may join only within attention
        beside, place = named.get(site.blocks.text or ""), site.blocks.joint
    count = beside.shape[1] if isinstance(beside, Tensor) else 0
    bias = size_bias(plan.size.view(view.batch, -1), count, place)
    if _BIAS in site.names:
        return call(**named, **{_BIAS: bias})
    mode = KeyBias(bias)
    with mode:
        out = call(**named)
    if not mode.met:
        raise UnsupportedModelError(
            f"TokenMerge(weighted=True) weighs the keys of softmax attention, but attention of block {site.block} does "
            f"not call torch.nn.functional.scaled_dot_product_attention on its {bias.shape[1]} tokens; leave weighted "
            "out, or let the model attend with PyTorch's own function."
        )
    return out


@handles(TokenMerge)
def build(plan: Plan) -> Sequence[object]:
    """Build the handler of its blocks."""
    return [MergedTokens(plan.method, *plan.span, plan.slot)]
