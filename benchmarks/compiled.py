"""Blocks compiled by torch.compile and not, without and with each method, in one process.

    python -m benchmarks.compiled --out benchmarks/results/compiled-cpu.json

A side makes the steps of one trajectory: the latents move and the noise level falls. The blocks of a DiT-S/2 and of a
Flux of 12 blocks are compiled one by one with fullgraph=True, by inductor. All four sides of a row run in turn; a time
is the median over rounds, per step. Rows say how much faster the method is, compilation, and both together, and how
many graphs there are with the method. Compiling takes some minutes. Exits with 1 if a step after the first trajectory
makes a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokdyn
from benchmarks import command_line
from benchmarks.overhead import dit, dit_inputs, flux, flux_inputs
from tokdyn.adapters import adapter_for
from tokdyn.bench import timing

STEPS = 8
METHODS: dict[str, list[Any]] = {
    "FeatureCache, half of the steps": [tokdyn.FeatureCache(steps=tuple(range(0, STEPS, 2)), num_steps=STEPS)],
    "DepthSkip, 2 of 12 blocks": [tokdyn.DepthSkip(blocks=(4, 8))],
    "TokenMerge, half of the tokens": [tokdyn.TokenMerge(ratio=0.5)],
    "Chunking, a quarter of the tokens": [tokdyn.Chunking(target=4)],
    "DynamicWidth, half of heads and channels": [tokdyn.DynamicWidth(tokens=False)],
    "FeatureCache, TokenMerge, DepthSkip": [
        tokdyn.FeatureCache(steps=tuple(range(0, STEPS, 2)), num_steps=STEPS),
        tokdyn.TokenMerge(ratio=0.5),
        tokdyn.DepthSkip(blocks=(4, 8)),
    ],
}
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "DiT-S/2, 256 tokens": (dit, dit_inputs),
    "Flux, 576 tokens": (flux, lambda: flux_inputs(24)),
}


@torch.no_grad()
def built(build: Callable[[], nn.Module], methods: list[Any] | None, compiled: bool) -> nn.Module:
    """Build a model; wrap it if there are methods, with half of all gates shut; compile its blocks on request."""
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    if methods is not None:
        tokdyn.wrap(model, methods)
        for method, part in tokdyn.parts(model):
            if isinstance(method, tokdyn.DynamicWidth):
                for gates in (part.heads, part.channels):  # type: ignore[union-attr]
                    gates.bias[::2] = -1.0  # type: ignore[index, union-attr]
    for blocks in adapter_for(model).blocks if compiled else ():
        for block in model.get_submodule(blocks.path).children():
            block.compile(fullgraph=True)
    return model


def trajectory(model: nn.Module, inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    """Return a function that makes the steps of one trajectory."""
    torch.manual_seed(1)
    x = inputs["hidden_states"]
    moves = [x + 0.1 * step * torch.randn_like(x) for step in range(STEPS)]
    levels = [inputs["timestep"] * (1 - 0.9 * step / STEPS) for step in range(STEPS)]
    calls = [
        {**inputs, "hidden_states": each, "timestep": level.to(inputs["timestep"].dtype)}
        for each, level in zip(moves, levels, strict=True)
    ]

    @torch.no_grad()
    def run() -> None:
        if hasattr(model, "tokdyn"):
            tokdyn.reset(model)
        for call in calls:
            model(**call)

    return run


def graphs() -> int:
    """Return the number of graphs that were made so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def measure(case: str, methods: list[Any], rounds: int) -> dict[str, Any]:
    """Time a model without and with methods, with plain and with compiled blocks."""
    build, inputs = CASES[case][0], CASES[case][1]()
    torch._dynamo.reset()
    sides, made = {}, {}
    for name, given, compiled in (
        ("dense", None, False),
        ("method", methods, False),
        ("dense, compiled", None, True),
        ("method, compiled", methods, True),
    ):
        before = graphs()
        sides[name] = trajectory(built(build, given, compiled), inputs)
        sides[name]()
        made[name] = graphs() - before
    before = graphs()
    found = timing.in_turn(sides, rounds=rounds, warmup=1)
    ms = {name: each["median_ms"] / STEPS for name, each in found.items()}
    return {
        "ms_per_step": ms,
        "range_ms": {name: [each["min_ms"] / STEPS, each["max_ms"] / STEPS] for name, each in found.items()},
        "method_faster": ms["dense"] / ms["method"],
        "method_faster_compiled": ms["dense, compiled"] / ms["method, compiled"],
        "compiled_faster": ms["dense"] / ms["dense, compiled"],
        "compiled_faster_with_method": ms["method"] / ms["method, compiled"],
        "both": ms["dense"] / ms["method, compiled"],
        "graphs": {"dense": made["dense, compiled"], "method": made["method, compiled"]},
        "graphs_later": graphs() - before,
    }


def main() -> int:
    """Measure, print, and save on request."""
    made = command_line.parser(__doc__, rounds=9)
    made.add_argument("--only", default="", help="measure the methods whose name contains this")
    given = command_line.start(made.parse_args())
    result: dict[str, Any] = {"machine": timing.machine(), "rounds": given.rounds, "steps": STEPS, "cases": {}}
    table = Table(
        "model", "method", "dense", "method", "compiled", "both", "method x", "compiled x", "both x", "graphs"
    )
    for case in CASES:
        for name, methods in METHODS.items():
            if given.only in name:
                found = result["cases"].setdefault(case, {})[name] = measure(case, methods, given.rounds)
                times = [f"{value:.1f}" for value in found["ms_per_step"].values()]
                ratios = [f"{found[key]:.2f}" for key in ("method_faster", "compiled_faster", "both")]
                table.add_row(case, name, *times, *ratios, str(found["graphs"]["method"]))
    Console(width=150).print("milliseconds per step", table)
    missed = [
        f"{case} {name} makes graphs after the first trajectory"
        for case, rows in result["cases"].items()
        for name, found in rows.items()
        if found["graphs_later"]
    ]
    if given.out:
        timing.write(given.out, {**result, "missed": missed})
    return command_line.finish(missed)


if __name__ == "__main__":
    sys.exit(main())
