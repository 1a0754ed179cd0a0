"""Measure the speed of the whole DC-DiT against a direct reading of its equations, and against what FLOPs promise.

    python -m benchmarks.dcdit --out benchmarks/results/dcdit-cpu.json

Takes ten to fifteen minutes on two idle cores, and exits with 1 if a bar is missed. Both sides have the same weights
and keep the same quarter of the tokens, and run in turn in one process; medians count. `--compile` compiles the
convolutions of the model, and all of the other side. Under autocast, tokdyn computes in fp32 on a CPU without
instructions for bf16, and the other side does what PyTorch does; `computed` in the result names the type.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import command_line, markdown, official
from tokdyn import ops
from tokdyn.bench import timing
from tokdyn.cost import model_parts
from tokdyn.models import DCDiT
from tokdyn.ops.layers import weights_cast_once
from tokdyn.ops.precision import autocast_is_slow
from tokdyn.train.setup import compile_parts

FORWARD = {("S", "fp32"): 1.12, ("S", "bf16"): 1.4, ("B", "fp32"): 1.06, ("B", "bf16"): 1.3}
STEP = {"fp32": 1.12, "bf16": 1.4}
MAIN, GROWTH = 3.1, 1.1
KEPT = 0.25


def case(size: str, batch: int) -> tuple[DCDiT, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Build a model with random weights, a batch, and a plan that keeps a quarter of the tokens."""
    torch.manual_seed(0)
    model = DCDiT.named(size)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, which no kernel should profit from
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    x, time, labels = torch.randn(batch, 4, 32, 32), torch.randint(1000, (batch,)), torch.randint(1000, (batch,))
    return model, (x, time, labels), torch.rand(batch, 1024) < KEPT


def precision(name: str) -> AbstractContextManager[Any]:
    """Return autocast to bf16, or a context that does nothing."""
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else nullcontext()


@contextmanager
def sampling(name: str) -> Iterator[None]:
    """Compute as the loop of a sampler does; entered once, so that neither side casts its weights in every call."""
    with torch.no_grad(), precision(name), weights_cast_once():  # autocast keeps no casts in inference mode
        yield


def computed(name: str) -> str:
    """Return the type that tokdyn's side computes in."""
    with precision(name):
        return "fp32" if autocast_is_slow(torch.zeros(())) else name


def sides(model: DCDiT, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Return the functions of both sides by name."""
    other: Callable[..., Tensor] = partial(official.forward, model)
    if compiled:
        compile_parts(model, "scaffold")
        other = torch.compile(other, dynamic=True)
    return {"tokdyn": lambda x, t, y, plan: model(x, t, y, plan=plan).sample, "equations": other}


def forward(size: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a call of a sampler, batch 8."""
    model, inputs, plan = case(size, 8)
    model.eval()
    both = sides(model, given.compile)
    with sampling(name):
        ours, theirs = (side(*inputs, plan).float() for side in both.values())
        times = timing.in_turn({key: partial(side, *inputs, plan) for key, side in both.items()}, rounds=given.rounds)
    bar = FORWARD[size, name]
    apart = ((ours - theirs).norm() / theirs.norm()).item()
    return {
        "what": "forward", "size": size, "precision": name, "batch": 8, "kept": plan.float().mean().item(),
        "computed": computed(name), "times": times, "speedup": timing.ratio(times, "equations", "tokdyn"), "bar": bar,
        "relative_difference": apart,
    }  # fmt: skip


def step(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure forward and backward of DC-DiT-S, batch 16."""
    model, inputs, plan = case("S", 16)
    model.train()
    both = sides(model, given.compile)
    run = {key: partial(_step, model, side, inputs, plan, name) for key, side in both.items()}
    times = timing.in_turn(run, rounds=max(3, 2 * given.rounds // 3))
    return {
        "what": "training step", "size": "S", "precision": name, "computed": computed(name), "batch": 16,
        "times": times,
        "speedup": timing.ratio(times, "equations", "tokdyn"), "bar": STEP[name],
        "peak_mib": {key: _peak(name, key) for key in both},
    }  # fmt: skip


def _step(model: DCDiT, side: Callable[..., Tensor], inputs: tuple[Tensor, ...], plan: Tensor, name: str) -> None:
    with precision(name):
        out = side(*inputs, plan)
    out.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def _peak(name: str, side: str) -> float:
    child = [sys.executable, "-m", "benchmarks.dcdit", "--peak", name, side]
    runs = [subprocess.run(child, check=True, capture_output=True, text=True).stdout for _ in range(5)]
    return sorted(map(float, runs))[2]  # they differ by two percent from process to process


def peak_here(name: str, side: str) -> float:
    """Measure the MiB that a first step adds at its peak."""
    model, inputs, plan = case("S", 16)
    return timing.peak_growth_mib(partial(_step, model, sides(model, False)[side], inputs, plan, name))


def main_network(given: argparse.Namespace) -> dict[str, Any]:
    """Measure DC-DiT-S in bf16 against its blocks on all tokens, tokdyn's own and in plain PyTorch, batch 8."""
    model, (x, time, labels), plan = case("S", 8)
    model.eval()
    dense, condition = torch.randn(8, 1024, 384), torch.randn(8, 384)

    def whole() -> None:
        model(x, time, labels, plan=plan)

    def blocks() -> None:
        inside, rows = model._compute_precision(dense)  # as a call of a model would
        with inside:
            for block in model.blocks:
                rows = block(rows, condition)

    def plain() -> None:
        inside, rows = model._compute_precision(dense)
        with inside:
            for block in model.blocks:
                rows = official.dense_block(block, rows, condition)

    with sampling("bf16"):
        times = timing.in_turn({"whole": whole, "blocks": blocks, "plain": plain}, rounds=given.rounds)
    inner = ("adaLN", "projections", "attention", "mlp")
    full = sum(flops for part, flops in model_parts(model, 1.0).items() if part in inner)
    return {
        "what": "against the blocks on all tokens", "precision": "bf16", "computed": computed("bf16"), "times": times,
        "speedup": timing.ratio(times, "blocks", "whole"), "bar": MAIN,
        "over_plain": timing.ratio(times, "plain", "whole"),
        "flop_ratio": full / sum(model_parts(model, KEPT).values()),
    }  # fmt: skip


def dechunk_growth(given: argparse.Namespace) -> dict[str, Any]:
    """Measure how de-chunking grows from 1,024 to 65,536 tokens: a quarter kept, width 384, one image."""
    times = {}
    for side in (32, 64, 128, 256):
        torch.manual_seed(0)
        keep = torch.rand(1, side * side) < KEPT
        features, probability = torch.randn(int(keep.sum()), 384), torch.rand(1, side * side)

        def run(features: Tensor = features, keep: Tensor = keep, p: Tensor = probability, side: int = side) -> None:
            with torch.inference_mode():
                ops.dechunk(features, p, keep, (side, side), 1.0)

        times[str(side * side)] = timing.in_turn({"tokdyn": run}, rounds=given.rounds)["tokdyn"]
    return {
        "what": "growth of de-chunking", "times": times, "bar": GROWTH,
        "exponent": timing.growth({int(tokens): found["median_ms"] for tokens, found in times.items()}),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Format calls and steps as the Markdown table of docs/performance.md."""
    lines = []
    for row in rows:
        if "equations" in row["times"]:
            ours, theirs = (row["times"][side]["median_ms"] for side in ("tokdyn", "equations"))
            peak, kind = row.get("peak_mib"), row["precision"]
            lines.append([
                f"{row['what']}, batch {row['batch']}", row["size"],
                kind if row["computed"] == kind else f"{kind}, tokdyn {row['computed']}",
                f"{theirs:,.0f}", f"{ours:,.0f}", f"{row['speedup']:.2f}", f"{row['bar']:g}",
                "" if peak is None else f"{peak['tokdyn']:,.0f} of {peak['equations']:,.0f}",
            ])  # fmt: skip
    head = ["what", "size", "type", "equations (ms)", "tokdyn (ms)", "faster", "bar", "peak, MiB"]
    return markdown.table(head, lines)


def main() -> int:
    """Measure everything, print it and save it."""
    parser = command_line.parser(__doc__, rounds=9)
    parser.add_argument("--sizes", default="S,B", help="sizes of the models, separated by commas")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = command_line.start(parser.parse_args())
    if given.peak:
        print(peak_here(*given.peak))
        return 0
    result: dict[str, Any] = {"machine": timing.machine(), "unit": "milliseconds", "compiled": given.compile}
    sizes = given.sizes.split(",")
    rows = [forward(size, name, given) for size, name in FORWARD if size in sizes]
    rows += [step(name, given) for name in STEP] + [main_network(given), dechunk_growth(given)]
    missed = []
    for row in rows:
        if "exponent" in row:
            row["met"] = row["exponent"] <= row["bar"]
            said = f"time ~ tokens^{row['exponent']:.2f} (bar {row['bar']})"
        else:
            row["met"] = row["speedup"] >= row["bar"]
            said = f"{row['speedup']:.2f}x (bar {row['bar']}x)"
        if "peak_mib" in row:
            row["met"] = row["met"] and row["peak_mib"]["tokdyn"] <= row["peak_mib"]["equations"]
            said += f", peak {row['peak_mib']['tokdyn']:.0f} of {row['peak_mib']['equations']:.0f} MiB"
        if "over_plain" in row:
            said += f", {row['over_plain']:.2f} against plain blocks"
        name = " ".join(str(row[key]) for key in ("what", "size", "precision") if key in row)
        print(f"{name}: {said}{'' if row['met'] else '  MISSED'}", flush=True)
        missed += [] if row["met"] else [name]
    result |= {"rows": rows, "missed": missed}
    if given.out:
        timing.write(given.out, result)
    return command_line.finish(missed)


if __name__ == "__main__":
    sys.exit(main())
