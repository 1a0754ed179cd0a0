"""TokenMerge at work: a branch sees merged tokens, and every token gets the result of the one it was merged into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach.handlers.matching import plan_of
from tokdyn.attach.handlers.packed_merge import packed_merge
from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role
from tokdyn.attach.tokens import follow, join, split
from tokdyn.errors import UnsupportedModelError
from tokdyn.methods import TokenMerge
from tokdyn.ops.merging import Merging, merge, unmerge
from tokdyn.ops.schedules import at
from tokdyn.ops.weighting import KeyBias, size_bias

_BIAS = "key_bias"  # attention with an argument of this name adds it to the logits of its keys itself


@dataclass(frozen=True)
class Merge:
    """Around attention, MLP or both, in some or all blocks."""

    method: TokenMerge
    first: int
    last: int

    def around(self, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Merge, compute, unmerge."""
        if (
            role.kind == "stream"
            or self.method.where not in (role.kind, "both")
            or not self.first <= role.block <= self.last
        ):
            return call(**named)
        if run.packing is not None:
            return packed_merge(self.method, self.first, run, role, call, named)
        if isinstance(self.method.ratio, float):
            return self._merged(run, role, call, named, self.method.ratio)
        ratios = [at(self.method.ratio, level) for level in run.level]
        if len(set(ratios)) == 1:
            return self._merged(run, role, call, named, ratios[0])
        groups = [[i for i, found in enumerate(ratios) if found == ratio] for ratio in dict.fromkeys(ratios)]

        def group(arguments: dict[str, Any]) -> Any:
            return self.around(run, role, call, arguments)

        parts = [run.part_of(samples, role.stack, named, group) for samples in groups]
        order = torch.tensor([i for samples in groups for i in samples]).argsort()
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(each).index_select(0, order.to(each[0].device)) for each in zip(*parts, strict=True))
        return torch.cat(parts).index_select(0, order.to(parts[0].device))

    def _merged(self, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any], ratio: float) -> Any:
        """The branch for samples that merge equally much."""
        if int(run.count * ratio) == 0:
            return call(**named)
        stack, before = role.stack, named[role.names[0]]
        place = (stack.inside if role.kind == "attention" else stack.inside_mlp) or stack.image
        text, x = split(before, None if place == "all" else run.count, place)
        batch, count, width = x.shape
        rows = x.reshape(-1, width)
        plan = plan_of(self.method, self.first, run, role, rows, ratio)
        if plan is None:
            return call(**named)
        after = join(text, merge(rows, plan).view(batch, -1, width), place)
        given = {key: after if value is before else value for key, value in named.items()}  # keys may be given again
        kept = plan.keep.view(batch, -1) - torch.arange(batch, device=x.device)[:, None] * count
        for how in stack.follow:
            if given.get(how.name) is not None:
                given[how.name] = follow(given[how.name], how, stack, kept, count)
        left = kept.shape[1]
        if role.kind == "attention":
            run.call.attention.append((batch, left))
        else:
            run.call.mlp.append((batch, left))
        if self.method.weighted and role.kind == "attention":
            out = _weighted(role, call, given, plan, text, place)
        else:
            out = call(**given)
        first, *rest = out if isinstance(out, tuple) else (out,)
        text, y = split(first, left, place)
        whole = join(text, unmerge(y.reshape(-1, y.shape[-1]), plan).view(batch, count, -1), place)
        return (whole, *rest) if isinstance(out, tuple) else whole


def _weighted(
    role: Role, call: Callable[..., Any], named: dict[str, Any], plan: Merging, text: Tensor | None, place: str
) -> Any:
    """Attention in which a merged token counts as often as it stands for tokens.

    Args:
        role: of the attention.
        call: the attention.
        named: its arguments.
        plan: what was merged.
        text: tokens that lie beside those of the image in the same tensor.
        place: where image tokens lie in it.
    """
    beside = text
    if text is None:  # it may join them only now
        beside, place = named.get(role.stack.text or ""), role.stack.joint
    words = beside.shape[1] if isinstance(beside, Tensor) else 0
    bias = size_bias(plan.size.view(len(plan.lengths), -1), words, place)
    if _BIAS in role.names:
        return call(**named, **{_BIAS: bias})
    mode = KeyBias(bias)
    with mode:
        out = call(**named)
    if not mode.met:
        raise UnsupportedModelError(
            f"TokenMerge(weighted=True) weighs the keys of softmax attention, but attention of block {role.block} does "
            f"not call torch.nn.functional.scaled_dot_product_attention on its {bias.shape[1]} tokens; leave weighted "
            "out, or let the model attend with PyTorch's own function."
        )
    return out
