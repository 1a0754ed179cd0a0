"""Time of the caching rules on CPU beside other caches: `python -m benchmarks.cache_rules --out results.json`.

A Flux of 4 double and 8 single blocks on 96 tokens and a Wan of 8 blocks on 128, both of width 768, run a trajectory
of 25 steps on latents that move from noise to an image at their own pace. Each rule gets the threshold with which it
computes 13 of them; the caches of cache-dit (pip install cache-dit, version 1.5) and of diffusers get the threshold
with which they compute as many steps of the same trajectory, and run on equal weights, in turn. What is computed is
counted by a hook in the last block. Prints seconds and FLOPs (a multiply-add is 2). Then each rule runs step by step in
turn with the cache that decides by the same quantity at equal computed steps, and nothing between the two: prints the
ratio of their times, the median over rounds, and exits with 1 if one is above 1.02. Takes about half an hour.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tokdyn
from benchmarks import command_line, markdown
from benchmarks.caching import flux
from benchmarks.trajectories import (
    Case,
    Side,
    flux_calls,
    in_rounds,
    spent,
    step_by_step,
    through,
    told,
    wan,
    wan_calls,
)
from tokdyn import FeatureCache
from tokdyn.bench.timing import machine, write

STEPS = 25
HALF = 13
LISTED = tuple(range(0, STEPS, 2))
BAR = 1.02
RATIOS = (1.0, *(1.0 + 0.02 * ((step * 7) % 5 - 2) for step in range(1, STEPS)))
"""Lengths of effects from step to step, as MagCache calibrates them; here only their cost is measured."""


def own(case: Case, **settings: Any) -> Side:
    """FeatureCache with these settings."""
    return told(tokdyn.wrap(case.build(), [FeatureCache(**settings)]), case.calls)


def of_diffusers(case: Case, name: str, **settings: Any) -> Side:
    """A cache of diffusers by the name of its configuration."""
    import diffusers

    model = case.build()
    model.enable_cache(getattr(diffusers, name)(**settings))

    def begin() -> AbstractContextManager[None]:
        model._reset_stateful_cache()
        return nullcontext()

    return through(model, case.calls, begin, lambda _: model.cache_context("cond"))


def of_cache_dit(case: Case, order: int | None = None, **settings: Any) -> Side | None:
    """DBCache of cache-dit, which computes the first block in every step; None if it is not installed."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    try:
        import cache_dit
    except ImportError:
        return None
    model = case.build()
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, num_inference_steps=STEPS,
        enable_separate_cfg=False, **settings,
    )  # fmt: skip
    forecast = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=forecast)
    known = {"cache_config": config} | ({} if forecast is None else {"calibrator_config": forecast})

    def begin() -> AbstractContextManager[None]:
        cache_dit.refresh_context(model, verbose=False, **known)
        return nullcontext()

    return through(model, case.calls, begin)


def at(build: Callable[[float], Side | None], number: int, low: float = 1e-4, high: float = 1e2) -> Side | None:
    """Search the threshold with which a cache computes a number of steps; the nearest if none does.

    Args:
        build: makes the side for a threshold.
        number: of steps to compute.
        low: a threshold that computes more.
        high: a threshold that computes fewer.
    """
    best: Side | None = None
    for _ in range(18):
        threshold = (low * high) ** 0.5
        side = build(threshold)
        if side is None:
            return None
        side.threshold = threshold
        side.run()
        found = len(side.computed)
        if best is None or abs(found - number) < abs(len(best.computed) - number):
            best = side
        if found == number:
            break
        low, high = (threshold, high) if found > number else (low, threshold)
    return best


OWN: dict[str, dict[str, Any]] = {
    "teacache": {},
    "teacache, first block": {"indicator": "first_block"},
    "teacache, time": {"indicator": "time"},
    "magcache": {"rule": "magcache", "ratios": RATIOS, "max_reused": 1},
    "easycache": {"rule": "easycache"},
    "seacache": {"rule": "seacache"},
}
"""Settings of rules that a threshold decides."""
PEERS: dict[str, dict[str, Callable[[Case, float], Side | None]]] = {
    "teacache, first block": {
        "cache-dit DBCache": lambda case, threshold: of_cache_dit(case, residual_diff_threshold=threshold),
        "diffusers first block": lambda case, threshold: of_diffusers(
            case, "FirstBlockCacheConfig", threshold=threshold
        ),
    },
    "magcache": {
        "diffusers MagCache": lambda case, threshold: of_diffusers(
            case, "MagCacheConfig", threshold=threshold, max_skip_steps=1, retention_ratio=1 / STEPS,
            num_inference_steps=STEPS, mag_ratios=torch.tensor(RATIOS),
        ),
    },
}  # fmt: skip
"""Caches that decide by the same quantity."""


def listed(case: Case) -> tuple[dict[str, Side], dict[str, str]]:
    """Sides that compute listed steps, with every forecast, and which of them are compared."""
    mask = {
        "residual_diff_threshold": 1e9, "steps_computation_mask": [int(step in LISTED) for step in range(STEPS)],
        "steps_computation_policy": "static",
    }  # fmt: skip
    sides: dict[str, Side | None] = {"steps": own(case, steps=LISTED)}
    sides |= {f"steps, forecast {order}": own(case, steps=LISTED, forecast=order) for order in (1, 2, "chebyshev")}
    sides["cache-dit, mask"] = of_cache_dit(case, **mask)
    sides["cache-dit, mask, Taylor 1"] = of_cache_dit(case, order=1, **mask)
    sides["cache-dit, mask, Taylor 2"] = of_cache_dit(case, order=2, **mask)
    sides["diffusers TaylorSeer 1"] = of_diffusers(
        case, "TaylorSeerCacheConfig", cache_interval=2, disable_cache_before_step=1,
        disable_cache_after_step=STEPS - 1, max_order=1, taylor_factors_dtype=torch.float32,
    )  # fmt: skip
    pairs = {
        "cache-dit, mask": "steps",
        "cache-dit, mask, Taylor 1": "steps, forecast 1",
        "cache-dit, mask, Taylor 2": "steps, forecast 2",
        "diffusers TaylorSeer 1": "steps, forecast 1",
    }
    found = {name: side for name, side in sides.items() if side is not None}
    return found, {peer: mine for peer, mine in pairs.items() if peer in found}


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Time and count a plain trajectory and that of every cache."""
    model = case.build()
    sides, pairs = listed(case)
    for name, settings in OWN.items():
        mine = at(lambda threshold, settings=settings: own(case, threshold=threshold, **settings), HALF)
        assert mine is not None
        sides[name] = mine
        for peer, build in PEERS.get(name, {}).items():
            other = at(lambda threshold, build=build: build(case, threshold), len(mine.computed))
            if other is not None:
                sides[peer], pairs[peer] = other, name
    sides["plain"] = through(model, case.calls)
    times = in_rounds({name: side.run for name, side in sides.items()}, max(3, rounds // 3))
    flops = {name: spent(side) for name, side in sides.items()}
    rows = {
        name: {
            "median_ms": statistics.median(times[name]), "min_ms": min(times[name]), "max_ms": max(times[name]),
            "computed": len(side.computed), "threshold": side.threshold, "gflops": flops[name] / 1e9,
        }
        for name, side in sides.items()
    }  # fmt: skip
    equal = {
        f"{mine} over {peer}": (sides[mine], sides[peer])
        for peer, mine in pairs.items()
        if len(sides[mine].computed) == len(sides[peer].computed)
    }
    ratios = {name: step_by_step(*pair, rounds) for name, pair in equal.items()}
    return {
        "rows": rows,
        "over": {name: statistics.median(each) for name, each in ratios.items()},
        "rounds_over": ratios,
        "unequal": [pair for peer, mine in pairs.items() if (pair := f"{mine} over {peer}") not in equal],
    }  # fmt: skip


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print the rows of a case."""
    table = Table(title=f"{name}: {STEPS} steps")
    for title in ("cache", "computed", "threshold", "GFLOPs", "ms", "of plain"):
        table.add_column(title)
    plain = found["rows"]["plain"]
    for row, each in found["rows"].items():
        threshold = "" if each["threshold"] is None else f"{each['threshold']:.4g}"
        table.add_row(
            row, str(each["computed"]), threshold, f"{each['gflops']:.1f}", f"{each['median_ms']:,.1f}",
            f"{each['median_ms'] / plain['median_ms']:.3f}",
        )  # fmt: skip
    Console().print(table)
    for pair, value in found["over"].items():
        print(f"{pair}: {value:.3f}")
    for pair in found["unequal"]:
        print(f"{pair}: no threshold computes as many steps")


def table(result: Mapping[str, Any]) -> str:
    """Format the seconds and the FLOPs of every cache in Markdown; a multiply-add is 2 FLOPs."""
    cases = list(result["cases"].values())
    head = ["cache"]
    for name in result["cases"]:
        head += [f"{name}: steps", "GFLOPs", "s", "of plain"]
    lines = []
    for cache in cases[0]["rows"]:
        line = [cache]
        for each in cases:
            row, plain = each["rows"][cache], each["rows"]["plain"]
            share = row["median_ms"] / plain["median_ms"]
            line += [str(row["computed"]), f"{row['gflops']:.0f}", f"{row['median_ms'] / 1e3:.2f}", f"{share:.2f}"]
        lines.append(line)
    return markdown.table(head, lines)


def ratios(result: Mapping[str, Any]) -> str:
    """Format the ratios of times to those of other caches in Markdown: the median, and the quartiles over rounds."""
    lines = []
    for name, case in result["cases"].items():
        for pair, rounds in case["rounds_over"].items():
            low, middle, high = statistics.quantiles(rounds, n=4)
            lines.append([name, pair, f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    return markdown.table(["model", "rule over cache", "time", "quartiles"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and save on request."""
    options = command_line.start(command_line.parser(__doc__, rounds=15).parse_args(argv))
    torch.manual_seed(0)
    cases = {
        "flux-768x12": Case(flux(4, 8, 12), flux_calls(8)),
        "wan-768x8": Case(wan(8, 8), wan_calls(2, 8)),
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        found[name] = measured(case, options.rounds)
        show(name, found[name])
    missed = [f"{name}: {pair} {value:.3f} of {BAR}" for name, each in found.items()
              for pair, value in each["over"].items() if value > BAR]  # fmt: skip
    if options.out:
        write(options.out, {"machine": machine(), "rounds": options.rounds, "cases": found, "missed": missed})
    return command_line.finish(missed)


if __name__ == "__main__":
    sys.exit(main())
