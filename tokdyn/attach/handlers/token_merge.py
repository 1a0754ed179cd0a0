"""The handler of TokenMerge: compute a sublayer on merged tokens, and copy each result to the tokens it stands for.

In every bucket of cells one token is the destination. The other tokens that are most similar to a destination are
averaged with it; each of those then gets the sublayer's result for its destination.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.coupling import check_groups
from tokdyn.adapters.tokens import join, select_samples, select_tokens, split
from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import Frame, Plan, Sublayer, handles
from tokdyn.attach.sites import Site
from tokdyn.attach.view import TokenView
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import TokenMerge
from tokdyn.methods.costs import matching_flops
from tokdyn.ops.destinations import Destinations, destinations, grid_destinations
from tokdyn.ops.merging import Merging, joined, match, match_parts, merge, merged_away, unmerge
from tokdyn.ops.pack import packing_of
from tokdyn.ops.schedules import at
from tokdyn.ops.weighting import KeyBias, size_bias
from tokdyn.tokens import Grid, cells

Call = Callable[..., Any]
_BIAS = "key_bias"  # attention with an argument of this name adds it to the logits of its keys itself


@dataclass
class Matchings:
    """What the blocks of one call share.

    Attributes:
        destinations: destinations that depend on cell and noise level only, by samples and source of the view, and by
            the place where the tokens of an image begin.
        plans: matchings that several blocks use, by sublayer, window of `reuse` blocks and source of the view. For each
            sample (its position in the batch, and the number of its part) the matching that it is part of, and its
            position there.
        windows: plans of single windows, for blocks that are compiled by themselves.
    """

    destinations: dict[Hashable, Destinations] = field(default_factory=dict)
    plans: dict[Hashable, dict[tuple[int, int], tuple[Merging, int]]] = field(default_factory=dict)
    windows: dict[int, dict[Hashable, dict[tuple[int, int], tuple[Merging, int]]]] = field(default_factory=dict)


@dataclass(eq=False)
class MergedTokens(Sublayer):
    """Merges tokens around attention, MLP or both.

    Attributes:
        method: the settings.
        first: index of the first block in which tokens are merged.
        last: index of the last.
        slot: slot of the call's `Matchings`.
    """

    method: TokenMerge
    first: int
    last: int
    slot: int

    def around(self, frame: Frame, view: TokenView, site: Site, call: Call, named: dict[str, Any]) -> Any:
        """Merge, compute and unmerge in the sublayers and blocks of the settings; elsewhere compute only."""
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

    def __post_init__(self) -> None:  # a curve leaves other numbers of tokens at other noise levels
        self.steady = isinstance(self.method.ratio, float)

    def alike(self, context: CallContext, block: int) -> int:
        """Return the first block that matches, or uses a matching, as this one does; -1 where nothing is merged."""
        if not self.first <= block <= self.last:
            return -1
        window, place = divmod(block - self.first, self.method.reuse)
        if self.method.reuse > 1:
            matchings = self._matchings(context)
            matchings.plans = matchings.windows.setdefault(window, {})
        return self.first + min(place, 1)

    def _by_ratio(
        self, frame: Frame, view: TokenView, site: Site, call: Call, named: dict[str, Any], ratios: Sequence[float]
    ) -> Any:
        """Compute each group of samples with the same ratio, and put the results into the order of the batch."""
        groups = [[i for i, other in enumerate(ratios) if other == ratio] for ratio in dict.fromkeys(ratios)]
        check_groups(frame.context.model, site.block, groups, view.batch)
        outputs = []
        for part in map(view.take, groups):
            inside = frame._replace(view=part.view)
            arguments = select_samples(named, part.places, view.batch, site.blocks)
            outputs.append(class_swap.within(inside, self.around, inside, part.view, site, call, arguments))
        order = torch.tensor([i for places in groups for i in places], device=view.device).argsort()
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(results).index_select(0, order) for results in zip(*outputs, strict=True))
        return torch.cat(outputs).index_select(0, order)

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
        following = [argument for argument in blocks.follow if named.get(argument.name) is not None]
        kept = plan.keep.view(view.batch, -1).remainder(view.room)
        followed: dict[str, Any] = {}
        for argument in following:  # an argument may have two token axes
            value = followed.get(argument.name, named[argument.name])
            followed[argument.name] = select_tokens(value, argument, blocks, kept, view.room)
        return followed

    def _plan(self, frame: Frame, view: TokenView, site: Site, rows: Tensor, ratios: Sequence[float]) -> Merging | None:
        """Match the input (T, D) of a sublayer, or reuse an earlier block's matching; None if no token is merged."""
        if self.method.reuse == 1:
            return self._match(frame.context, view, rows, ratios)
        key = (site.kind, (site.block - self.first) // self.method.reuse, view.source)
        plans = self._matchings(frame.context).plans.setdefault(key, {})
        names = [(sample, view.samples[:place].count(sample)) for place, sample in enumerate(view.samples)]
        new = [place for place, name in enumerate(names) if name not in plans]
        if new:  # samples that skipped the block in which the others were matched
            plan = self._match(frame.context, view, rows, ratios)
            if plan is None:
                return None
            plans.update({names[place]: (plan, place) for place in new})
        matched = [plans[name] for name in names]
        first = matched[0][0]
        whole = len(first.lengths) == view.batch
        if whole and all(plan is first and place == i for i, (plan, place) in enumerate(matched)):
            return first
        return joined([plan.sample(place) for plan, place in matched])

    def _match(self, context: CallContext, view: TokenView, rows: Tensor, ratios: Sequence[float]) -> Merging | None:
        """Match the rows (T, D) by their present values; None if no token is merged."""
        if view.packing is None and any(context.beside):
            return self._match_images(context, view, rows, ratios[0])
        sizes = view.sizes if len(rows) == sum(view.sizes) else (len(rows) // view.batch,) * view.batch
        into = self._into(context, view, rows, view.grid or context.grid)
        if not self._spend(context, sizes, into, ratios, rows.shape[1]):
            return None
        return match(rows, sizes, into, ratios[0] if len(set(ratios)) == 1 else list(ratios))

    def _match_images(self, context: CallContext, view: TokenView, rows: Tensor, ratio: float) -> Merging | None:
        """Match the generated tokens, and on request the tokens of each reference, among themselves."""
        images, beside = context.images, context.beside
        counts = [cells(grid) for grid in images.references]
        parts = [(beside[0], images.grid, view.generated(beside))]
        for number, grid in enumerate(images.references if self.method.references == "merge" else ()):
            at = sum(counts[:number]) if number < images.leading else view.room - sum(counts[number:])
            parts.append((at, grid, TokenView(view.samples, cells(grid), cells(grid), view.device)))
        pairs, merged, rows = [], False, rows.detach()  # recomputed blocks reuse the matching
        first = torch.arange(view.batch, device=rows.device)[:, None] * view.room
        for at, grid, part in parts:
            own = (first + torch.arange(at, at + part.room, device=rows.device)).flatten()
            into = self._into(context, part, rows.index_select(0, own), grid, at)
            merged |= self._spend(context, part.sizes, into, (ratio,) * view.batch, rows.shape[1])
            pairs.append((own, into))
        return match_parts(rows, (view.room,) * view.batch, pairs, ratio) if merged else None

    def _spend(
        self, context: CallContext, sizes: Sequence[int], into: Destinations, ratios: Sequence[float], width: int
    ) -> bool:
        """Return whether any of the tokens of each sample, `sizes`, are merged; record the FLOPs of matching them."""
        buckets = into.table.shape[1]
        merged = [merged_away(size, buckets, ratio) for size, ratio in zip(sizes, ratios, strict=True)]
        context.trace.fall_short("TokenMerge", ratios, merged, sizes)
        alike = into.others is not None and len(set(merged)) == 1
        for size in (size for size, count in zip(sizes, merged, strict=True) if count):
            context.trace.spend("TokenMerge matching", matching_flops(size, buckets, alike, width))
        return any(merged)

    def _into(self, context: CallContext, view: TokenView, rows: Tensor, grid: Grid, first: int = 0) -> Destinations:
        """Choose a destination in every bucket of a grid, for rows (T, D) that begin at `first` among the image tokens.

        It is the one with the largest norm, or one chosen by cell, seed and noise level once for all blocks of a call.
        """
        bucket, seed = self.method.bucket, self.method.seed
        if self.method.important:
            norms = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
            return destinations(*view.rows(), view.batch, grid, bucket, importance=norms)
        known, key = self._matchings(context).destinations, (view.samples, view.source, first)
        if key in known:
            return known[key]
        step = 0 if seed is None else (context.level_tensor(view, rows.device) * 1000).round().long()
        if view.index is None and view.packing is None:
            chosen = grid_destinations(view.batch, grid, rows.device, bucket, seed, step)
        else:
            chosen = destinations(*view.rows(), view.batch, grid, bucket, seed, step)
        known[key] = chosen
        return chosen

    def _matchings(self, context: CallContext) -> Matchings:
        """Return what the blocks of this call share."""
        context.slots[self.slot] = context.slots[self.slot] or Matchings()
        return context.slots[self.slot]  # type: ignore[no-any-return]


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
