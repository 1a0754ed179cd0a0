"""Sampling at the shapes of the paper: the share spent in the model, and the FLOPs and time that a stack saves.

    python -m benchmarks.sampling --out benchmarks/results/sampling-cpu.json

Takes about ten minutes on two otherwise idle cores. Exits with 1 if a target is missed. Weights are random, since
neither FLOPs nor time depend on them, with two exceptions: the router runs as always but is overruled by a plan that
keeps every token with probability 1/4, and the gates of DynamicWidth are set by hand so that four of six heads and
groups of channels are on. Nothing is claimed about the resulting images.
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
from benchmarks import command_line, markdown
from tokdyn import DynamicWidth, FeatureCache, TokenMerge
from tokdyn.bench import timing
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.models import DCDiT, DiT
from tokdyn.sample.costs import mean_kept, step_costs

SHARE, SAVED, REALISED = 0.95, 0.40, 0.85
LITE = {"uncond_tail_drop": 0.9}
ON, HEADS = 4, 6  # heads and groups of channels of the S models that DynamicWidth leaves on, and all of them


def inside_the_model() -> dict[str, Any]:
    """Measure the share of 250 guided steps that is spent in calls of DC-DiT-S, at batch 1."""
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
    """Build the model of a stack with its methods, and the tail-drop settings of its sampler."""
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
        for method, part in tokdyn.parts(model):
            if method == width:
                _set_gates(part)
    if isinstance(model, DCDiT):
        model.register_forward_pre_hook(_planned, with_kwargs=True)
    return model, LITE if name.startswith(("+", "DC-DiT-S, Lite")) else {}


def _planned(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Make every call keep a quarter of the tokens before tail drop."""
    rows = given[0] if given else named["hidden_states"]
    generator = torch.Generator().manual_seed(0)
    plan = torch.rand(len(rows), 1024, generator=generator) < 0.25
    return given, {**named, "plan": plan}


def _set_gates(gates: Any) -> None:
    row = torch.tensor([1.0] * (ON - 1) + [-1.0] * (HEADS - ON))  # the first is always on
    with torch.no_grad():
        for layer in (gates.heads, gates.channels):
            layer.bias.copy_(row.repeat(len(layer.bias) // len(row)))


NAMES = [
    "DiT-S/2", "DiT-S/2, FeatureCache", "DC-DiT-S", "DC-DiT-S, Lite-CFG", "+ DynamicWidth", "+ FeatureCache",
    "+ TokenMerge",
]  # fmt: skip


def stacks(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure FLOPs and time per image of every stack, and what it saves relative to the first."""
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
    """Format the table of the results page."""
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
    """Measure, print, and save on request."""
    parser = command_line.parser(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cached", type=float, default=0.6, help="share of computed steps")
    given = command_line.start(parser.parse_args())
    result: dict[str, Any] = {"machine": timing.machine(), "units": "a multiply-add is 2 FLOPs"}
    share = inside_the_model()
    rows = stacks(given)
    full = rows[-1]
    realised = full["time_saved"] / full["flops_saved"]
    met = full["flops_saved"] >= SAVED and realised >= REALISED
    print(table(rows))
    bars = {"flops_saved": SAVED, "realised": REALISED}
    result |= {"inside": share, "stacks": rows, "bars": bars, "time_saved_over_flops_saved": realised, "met": met}
    if given.out:
        timing.write(given.out, result)
    print(f"{share['share']:.1%} of 250 guided steps are spent in the model")
    print(f"the full stack saves {full['flops_saved']:.1%} of the FLOPs, and {realised:.2f} times that share of time")
    missed = [] if share["met"] else [f"{SHARE:.0%} of the steps in the model"]
    return command_line.finish(missed if met else [*missed, f"FLOPs saved {SAVED:.0%}, realised {REALISED}"])


if __name__ == "__main__":
    sys.exit(main())
