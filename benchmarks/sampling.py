"""Sampling at the shapes of the paper: how much of it is the model, what a stack of methods saves of FLOPs and time.

    python -m benchmarks.sampling --out benchmarks/results/sampling-cpu.json

About ten minutes on two cores with nothing else running. Exits with 1 if a bar is missed. Weights are random: neither
FLOPs nor time depend on what they are, but for the router, which decides as always and is then overruled by a plan that
keeps every token with a chance of a quarter, and for the gates of DynamicWidth, which are set by hand: four of six
heads and groups of channels are on. Of the images that come out nothing is claimed.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import nn

import tokdyn
from benchmarks import markdown
from tokdyn import DynamicWidth, FeatureCache, TokenMerge
from tokdyn.bench import timing
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import Sampler, generate
from tokdyn.models import DCDiT, DiT
from tokdyn.sample.costs import mean_kept, step_costs

SHARE, SAVED, REALISED = 0.95, 0.40, 0.85
LITE = {"uncond_tail_drop": 0.9}
ON, HEADS = 4, 6  # heads and groups of channels that DynamicWidth leaves on, of those of the S models


def inside_the_model() -> dict[str, Any]:
    """Share of the time of a run of 250 guided steps that is spent in calls of DC-DiT-S, batch 1."""
    model = DCDiT.named("S").eval()
    clock = {"inside": 0.0, "since": 0.0}
    model.register_forward_pre_hook(lambda *_: clock.update(since=time.perf_counter()))
    model.register_forward_hook(lambda *_: clock.update(inside=clock["inside"] + time.perf_counter() - clock["since"]))
    shares = []
    for seed in range(3):
        clock["inside"], start = 0.0, time.perf_counter()
        generate(model, Sampler(scheduler="ddpm", steps=250, guidance=1.5), Objective(), [207], [seed])
        shares.append(clock["inside"] / (time.perf_counter() - start))
    share = sorted(shares)[1]
    return {"what": "250 guided steps", "steps": 250, "share": share, "bar": SHARE, "met": share >= SHARE}


def stacked(name: str, steps: int, cached: float) -> tuple[nn.Module, dict[str, float]]:
    """A model with the methods of that name, and the settings of its sampler."""
    torch.manual_seed(0)
    model: nn.Module = (DiT.named("S/2") if name.startswith("DiT") else DCDiT.named("S")).eval()
    computed = round(steps * cached)
    cache = FeatureCache(steps=tuple(sorted({round(at * steps / computed) for at in range(computed)})))
    width, merge = DynamicWidth(tokens=False), TokenMerge(ratio=0.3, bucket=4, where="both")
    methods = {
        "DiT-S/2, FeatureCache": [cache],
        "+ DynamicWidth": [width],
        "+ FeatureCache": [cache, width],
        "+ TokenMerge": [cache, merge, width],
    }.get(name, [])
    if methods:
        model = tokdyn.wrap(model, methods)
        for part in model.tokdyn.parts.values() if width in methods else ():
            if hasattr(part, "channels"):
                _set(part)
    if isinstance(model, DCDiT):
        model.register_forward_pre_hook(_planned, with_kwargs=True)
    return model, LITE if name.startswith(("+", "DC-DiT-S, Lite")) else {}


def _planned(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Every call keeps a quarter of the tokens, before its tail drop."""
    rows = given[0] if given else named["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    plan = torch.rand(len(rows), 1024, generator=generator) < 0.25
    return given, {**named, "plan": plan}


def _set(gates: Any) -> None:
    row = torch.tensor([1.0] * (ON - 1) + [-1.0] * (HEADS - ON))  # the first is always on
    with torch.no_grad():
        for layer in (gates.heads, gates.channels):
            layer.bias.copy_(row.repeat(len(layer.bias) // len(row)))


NAMES = [
    "DiT-S/2", "DiT-S/2, FeatureCache", "DC-DiT-S", "DC-DiT-S, Lite-CFG", "+ DynamicWidth", "+ FeatureCache",
    "+ TokenMerge",
]  # fmt: skip


def stacks(given: argparse.Namespace) -> list[dict[str, Any]]:
    """FLOPs and time an image, every row beside the first."""
    labels, seeds = list(range(given.batch)), list(range(given.batch))
    runs, rows = {}, []
    for name in NAMES:
        model, budget = stacked(name, given.steps, given.cached)
        sampler = Sampler(scheduler="dpm", steps=given.steps, guidance=1.5, **budget)
        runs[name] = partial(generate, model, sampler, Objective(), labels, seeds)
        costs = step_costs(model, runs[name]().steps, given.batch)
        rows.append({"stack": name, "kept": mean_kept(costs), "gflops": sum(each.gflops for each in costs)})
    times = timing.in_turn(runs, rounds=given.rounds)
    for row in rows:
        row["milliseconds"] = times[row["stack"]]["median_ms"] / given.batch
        row["times"] = times[row["stack"]]
        row["flops_saved"] = 1 - row["gflops"] / rows[0]["gflops"]
        row["time_saved"] = 1 - row["milliseconds"] / rows[0]["milliseconds"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, as the results page has it."""
    lines = []
    for row in rows:
        first = row is rows[0]
        lines.append([
            row["stack"], "" if row["kept"] is None else f"{row['kept']:.1%}", f"{row['gflops']:.0f}",
            "" if first else f"{row['flops_saved']:.0%}", f"{row['milliseconds']:.0f}",
            "" if first else f"{row['time_saved']:.0%}",
        ])  # fmt: skip
    return markdown.table(["stack", "kept", "GFLOPs per image", "saved", "ms per image", "time saved"], lines)


def main() -> int:
    """Measure everything, print it, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="save the result as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cached", type=float, default=0.6, help="share of the steps that compute the blocks")
    given = parser.parse_args()
    timing.prepare()
    result: dict[str, Any] = {"machine": timing.machine(), "units": "a multiply-add is 2 FLOPs"}
    share = inside_the_model()
    rows = stacks(given)
    full = rows[-1]
    realised = full["time_saved"] / full["flops_saved"]
    met = full["flops_saved"] >= SAVED and realised >= REALISED
    print(table(rows))
    print(f"{share['share']:.1%} of 250 guided steps inside the model{'' if share['met'] else '  MISSED'}")
    print(f"the full stack: {full['flops_saved']:.1%} of the FLOPs saved, {realised:.2f} of that in time: "
          f"{'met' if met else 'MISSED'}")  # fmt: skip
    bars = {"flops_saved": SAVED, "realised": REALISED}
    result |= {"inside": share, "stacks": rows, "bars": bars, "time_saved_over_flops_saved": realised, "met": met}
    if given.out:
        timing.write(given.out, result)
    return 0 if met and share["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
