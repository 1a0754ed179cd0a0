"""TokenMerge at work: a branch sees merged tokens, and every token gets the result of the one it was merged into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach.roles import Role
from tokdyn.attach.run import Run
from tokdyn.attach.tokens import follow, join, split
from tokdyn.methods import TokenMerge
from tokdyn.ops.destinations import destinations
from tokdyn.ops.merging import Merging, match, merge, unmerge
from tokdyn.ops.schedules import at
from tokdyn.tokens import cells


@dataclass(frozen=True)
class Merge:
    """Around attention, MLP or both, in some or all blocks."""

    method: TokenMerge
    first: int
    last: int

    def around(self, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """Merge, compute, unmerge."""
        if self.method.where not in (role.kind, "both") or not self.first <= role.block <= self.last:
            return call(**named)
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
        name = role.names[0]
        place = (role.stack.inside if role.kind == "attention" else role.stack.inside_mlp) or role.stack.image
        text, x = split(named[name], None if place == "all" else run.count, place)
        plan = self._plan(run, x, ratio)
        if len(plan.source) == 0:
            return call(**named)
        batch, count, width = x.shape
        merged = merge(x.reshape(-1, width), plan).view(batch, -1, width)
        before, after = named[name], join(text, merged, place)  # some give attention the same tokens as keys again
        named = {key: after if value is before else value for key, value in named.items()}
        kept = plan.keep.view(batch, -1) - torch.arange(batch, device=x.device)[:, None] * count
        for how in role.stack.follow:
            if named.get(how.name) is not None:
                named[how.name] = follow(named[how.name], how, role.stack, kept, count)
        if role.kind == "attention":
            run.call.attention = merged.shape[1]
        else:
            run.call.mlp = merged.shape[1]
        out = call(**named)
        first, *rest = out if isinstance(out, tuple) else (out,)
        text, y = split(first, merged.shape[1], place)
        y = unmerge(y.reshape(-1, y.shape[-1]), plan).view(batch, count, -1)
        whole = join(text, y, place)
        return (whole, *rest) if isinstance(out, tuple) else whole

    def _plan(self, run: Run, x: Tensor, ratio: float) -> Merging:
        """Which tokens merge, from the input of the branch."""
        batch, count, width = x.shape
        everything = torch.arange(cells(run.grid), device=x.device).expand(batch, -1)
        cell = (everything if run.index is None else run.index).reshape(-1)
        sample = torch.arange(batch, device=x.device).repeat_interleave(count)
        rows = x.detach().reshape(-1, width)
        into = destinations(
            cell,
            sample,
            batch,
            run.grid,
            self.method.bucket,
            self.method.seed,
            0 if self.method.seed is None else round(run.level[0] * 1000),
            rows.float().norm(dim=1) if self.method.important else None,
        )
        return match(rows, [count] * batch, into, ratio)
