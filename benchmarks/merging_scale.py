"""TokenMerge on many tokens: how FLOPs, memory and time of matching grow, and what cheaper matching costs in quality.

    python -m benchmarks.merging_scale --out benchmarks/results/merging-scale-cpu.json

FLOPs (a multiply-add is 2) and the bytes that are held at a time are counted, on tensors without memory; times are
medians in one process, of windows beside the whole grid where that is feasible. The growth of each is the exponent of
a fit on logarithms from 1,024 to 131,072 tokens, in windows of 8 cells along each axis. One attention on the 75,600
tokens of a 720p video is timed by 256 of its queries. Quality is that of the shipped base, whose predictions with
merging are compared with those without, and of smooth features on larger grids. Takes minutes; exits with 1 if a target
is missed.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tokdyn
from benchmarks import command_line
from tokdyn import TokenMerge
from tokdyn.bases import open_base
from tokdyn.bench import timing
from tokdyn.ops.destinations import grid_destinations, widths
from tokdyn.ops.matching import some_channels
from tokdyn.ops.merging import Merging, match, merge, unmerge
from tokdyn.ops.windows import tiling
from tokdyn.tokens import Grid, cells

RATIO, EXPONENT, WINDOW = 0.5, 1.1, 8
VIDEO: Grid = (21, 45, 80)  # Wan at 720p: 81 frames of 720 x 1280 pixels
VIDEO_WIDTH, QUERIES = 3072, 256
BYTES, SHARE = 10**9, 0.1  # of memory, and of one attention
GRIDS: tuple[Grid, ...] = (
    (16, 8, 8),
    (16, 8, 16),
    (16, 16, 16),
    (16, 16, 32),
    (16, 32, 32),
    (16, 32, 64),
    (16, 64, 64),
    (16, 64, 128),
)
WHOLE = 8192  # tokens up to which the whole grid is timed too


class Held(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, once for all views of one memory; `most` is the peak."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.most = self._now = 0
        self._users: dict[int, int] = {}
        self._before = {each.untyped_storage()._cdata for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in self._before:
                    self._hold(made, storage._cdata, storage.nbytes())
        return out

    def _hold(self, made: Tensor, place: int, count: int) -> None:
        if place not in self._users:
            self._now += count
            self.most = max(self.most, self._now)
        self._users[place] = self._users.get(place, 0) + 1
        weakref.finalize(made, self._release, place, count)

    def _release(self, place: int, count: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self._now -= count


def matching(x: Tensor, grid: Grid, window: int | None, whole: bool = False) -> Merging:
    """Match the tokens (N, D) of one grid, choosing destinations anew."""
    tiles = None if whole else tiling(grid, widths(grid, 2), window)
    return match(x, [len(x)], grid_destinations(1, grid, x.device, tiling=tiles), RATIO)


def through(x: Tensor, grid: Grid, window: int | None, whole: bool = False) -> Tensor:
    """Match, merge and unmerge."""
    plan = matching(x, grid, window, whole)
    return unmerge(merge(x, plan), plan)


def counted(grid: Grid, width: int, window: int | None, whole: bool = False) -> dict[str, int]:
    """Count the FLOPs of matching, and the most bytes that it holds beside the tokens, in bf16."""
    with torch.device("meta"):
        x = torch.empty(cells(grid), width, dtype=torch.bfloat16)
    with Held(x) as held, FlopCounterMode(display=False) as flops:
        matching(x, grid, window, whole)
    return {"flops": flops.get_total_flops(), "bytes": held.most}


def growing(width: int, rounds: int) -> list[dict[str, Any]]:
    """Count and time matching on growing videos."""
    rows = []
    for grid in GRIDS:
        x = torch.randn(cells(grid), width)
        sides: dict[str, Callable[[], Any]] = {"windows": lambda x=x, grid=grid: through(x, grid, WINDOW)}
        if cells(grid) <= WHOLE:
            sides["whole grid"] = lambda x=x, grid=grid: through(x, grid, None, whole=True)
        times = timing.in_turn(sides, rounds=rounds, warmup=1)
        rows.append(
            {
                "tokens": cells(grid),
                "windows": counted(grid, width, WINDOW),
                "default": counted(grid, width, None),
                "whole grid": counted(grid, width, None, whole=True),
                "median_ms": {name: each["median_ms"] for name, each in times.items()},
            }
        )
    return rows


def video(rounds: int) -> dict[str, Any]:
    """Compare matching the tokens of a long video with one attention on them."""
    count, width, heads = cells(VIDEO), VIDEO_WIDTH, VIDEO_WIDTH // 128
    found: dict[str, Any] = {"grid": VIDEO, "width": width, **counted(VIDEO, width, None)}
    found["attention_flops"] = 8 * count * width**2 + 4 * count**2 * width
    found["whole_grid"] = counted(VIDEO, width, None, whole=True)
    if rounds:
        x = torch.randn(count, width).bfloat16()
        keys = x.view(1, count, heads, -1).transpose(1, 2)
        some, weight = x[:QUERIES], torch.randn(4 * width, width).bfloat16()

        def attention() -> Tensor:  # of some queries, with the projections of as many tokens
            F.linear(some, weight)
            return F.scaled_dot_product_attention(keys[:, :, :QUERIES], keys, keys)

        times = timing.in_turn({"matching": lambda: matching(x, VIDEO, None), "attention": attention}, rounds, 1)
        found["matching_ms"] = times["matching"]["median_ms"]
        found["attention_ms"] = times["attention"]["median_ms"] * count / QUERIES
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "window=4": {"window": 4},
    "window=2": {"window": 2},
    "metric_width=64": {"metric_width": 64},
    "metric_width=32": {"metric_width": 32},
    "reuse=2": {"reuse": 2},
    "reuse=6": {"reuse": 6},
    "reuse_steps=2": {"reuse_steps": 2},
    "reuse_steps=4": {"reuse_steps": 4},
    "reuse=2, reuse_steps=2": {"reuse": 2, "reuse_steps": 2},
}


@torch.no_grad()
def trained(images: int = 20, steps: int = 8) -> dict[str, float]:
    """Measure how far the predictions of the shipped base move when tokens are merged, relative to their size.

    All are asked for the same latents: those of sampling without merging, by Euler's method.
    """
    base: Any = open_base("shapes").eval()
    models = {
        name: tokdyn.wrap(copy.deepcopy(base), [TokenMerge(ratio=RATIO, **settings)])
        for name, settings in SETTINGS.items()
    }
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) % 10
    error, size = dict.fromkeys(models, 0.0), 0.0
    with ExitStack() as stack:
        places = {name: stack.enter_context(tokdyn.trajectory(model, steps)) for name, model in models.items()}
        for step in range(steps):
            call = {"hidden_states": x, "timestep": torch.full((images,), 1 - step / steps), "class_labels": labels}
            plain = base(**call).sample[:, :3]
            for name, model in models.items():
                places[name].step = step
                error[name] += (model(**call).sample[:, :3] - plain).square().sum().item()
            size += plain.square().sum().item()
            x = x - plain / steps
    return {name: (each / size) ** 0.5 for name, each in error.items()}


def smooth(grid: Grid, width: int, seed: int) -> Tensor:
    """Make features (N, D) of objects that come up at several places, on a smooth background, with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = tuple(max(2, size // 6) for size in grid)
    shape, full = (1,) * (3 - len(grid)) + coarse, (1,) * (3 - len(grid)) + grid
    noise = torch.randn(1, width, *shape, generator=generator)
    background = F.interpolate(noise, size=full, mode="trilinear", align_corners=True).flatten(2)[0].T
    places = torch.rand(96, len(grid), generator=generator) * torch.tensor(grid)
    kind = torch.randint(24, (96,), generator=generator)
    cell = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).float()
    objects = torch.randn(24, width, generator=generator)[kind[torch.cdist(cell, places).argmin(1)]]
    return objects + 0.5 * background / background.std() + 0.3 * torch.randn(objects.shape, generator=generator)


@torch.no_grad()
def synthetic(width: int = 256, heads: int = 4) -> list[dict[str, Any]]:
    """Compare windows and channels with exact matching: the similarity of merged pairs, and the error of attention."""
    rows = []
    for grid, windows in (((64, 64), (None, 32, 16, 8)), ((16, 24, 24), (None, 12, 8, 4))):
        x = smooth(grid, width, 0)
        project = torch.randn(width, 3 * width, generator=torch.Generator().manual_seed(1)) * 1.4 * width**-0.5

        def attention(tokens: Tensor, project: Tensor = project) -> Tensor:
            q, k, v = (tokens @ project).view(1, len(tokens), 3, heads, -1).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[0]

        dense = attention(x)
        for window, channels in [*((window, None) for window in windows), (None, width // 2), (None, width // 4)]:
            tiles = None if window is None else tiling(grid, widths(grid, 2), window)
            into = grid_destinations(1, grid, x.device, tiling=tiles)
            plan = match(some_channels(x, channels), [len(x)], into, RATIO)
            target = plan.keep[plan.slot[plan.source]]
            error = (unmerge(attention(merge(x, plan)), plan) - dense).norm() / dense.norm()
            rows.append(
                {
                    "grid": grid,
                    "window": window,
                    "metric_width": channels,
                    "similarity": F.cosine_similarity(x[plan.source], x[target]).mean().item(),
                    "attention_error": error.item(),
                }
            )
    return rows


def main() -> int:
    """Measure, print, and save on request."""
    parser = command_line.parser(__doc__, rounds=5)
    parser.add_argument("--width", type=int, default=128, help="width of the tokens whose growth is measured")
    given = command_line.start(parser.parse_args())
    with torch.no_grad():
        rows, large = growing(given.width, given.rounds), video(given.rounds)
    table = Table("tokens", "GFLOPs", "MB held", "ms", "whole grid: GFLOPs", "MB held", "ms", title="matching")
    for row in rows:
        here = [f"{row['windows']['flops'] / 1e9:.3f}", f"{row['windows']['bytes'] / 1e6:.1f}"]
        whole = [f"{row['whole grid']['flops'] / 1e9:.3f}", f"{row['whole grid']['bytes'] / 1e6:.1f}"]
        ms = [f"{row['median_ms'][name]:.1f}" if name in row["median_ms"] else "" for name in ("windows", "whole grid")]
        table.add_row(f"{row['tokens']:,}", *here, ms[0], *whole, ms[1])
    Console().print(table)
    growth = {
        what: timing.growth({row["tokens"]: row["windows"][what] for row in rows}) for what in ("flops", "bytes")
    } | {"time": timing.growth({row["tokens"]: row["median_ms"]["windows"] for row in rows})}
    default = {
        what: timing.growth({row["tokens"]: row["default"][what] for row in rows}) for what in ("flops", "bytes")
    }
    print("exponents in windows:", {name: round(value, 3) for name, value in growth.items()})
    print("exponents by default:", {name: round(value, 3) for name, value in default.items()})
    share = large["matching_ms"] / large["attention_ms"]
    print(
        f"{cells(VIDEO):,} tokens of width {VIDEO_WIDTH}: {large['bytes'] / 1e6:.0f} MB held, "
        f"{large['flops'] / large['attention_flops']:.2%} of the FLOPs of one attention, {share:.2%} of its time"
    )
    quality, made = trained(), synthetic()
    for name, error in quality.items():
        print(f"shipped base, {name}: predictions move by {error:.3f}")
    for row in made:
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    exponents = {**growth, **{f"{name} by default": value for name, value in default.items()}}
    missed = [f"exponent of {name}" for name, value in exponents.items() if value > EXPONENT]
    missed += ["memory"] if large["bytes"] > BYTES else []
    missed += ["a tenth of one attention"] if max(share, large["flops"] / large["attention_flops"]) > SHARE else []
    if given.out:
        parts = {"growth": growth, "growth_by_default": default, "matching": rows, "video": large}
        result = {"machine": timing.machine(), "ratio": RATIO, "width": given.width, **parts}
        timing.write(given.out, {**result, "trained": quality, "synthetic": made, "missed": missed})
    return command_line.finish(missed)


if __name__ == "__main__":
    sys.exit(main())
