"""Measure the parts of DC-DiT: de-chunking, the share outside the blocks, packed blocks against dense ones.

    python -m benchmarks.flagship --out benchmarks/results/flagship-cpu.json

Takes five to ten minutes on two idle cores, and exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks import command_line, naive, official
from benchmarks.dcdit import sampling
from tokdyn import ops
from tokdyn.bench import timing
from tokdyn.models import DCDiT

BARS = {32: 5.0, 64: 10.0, 128: 30.0}


def dechunk_case(batch: int, side: int, width: int = 384) -> tuple[torch.Tensor, ...]:
    """Draw random kept tokens, a quarter of the cells."""
    probability = torch.rand(batch, side * side)
    keep = torch.rand(batch, side * side) < 0.25
    features = torch.randn(int(keep.sum()), width)
    order, real = naive.chunk_by_sorting(keep)
    padded = torch.zeros(*order.shape, width)
    padded[real] = features
    return features, probability, keep, padded, order, real


def dechunk(batch: int, side: int, rounds: int) -> dict[str, Any]:
    """Measure de-chunking against the all-pairs form, forward in fp32."""
    features, probability, keep, padded, order, real = dechunk_case(batch, side)
    grid = (side, side)
    ours = ops.dechunk(features, probability, keep, grid, 1.0)
    theirs = naive.dense_dechunk(padded, probability, order, real, keep, side)
    with torch.no_grad():
        times = timing.in_turn(
            {
                "tokdyn": lambda: ops.dechunk(features, probability, keep, grid, 1.0),
                "dense": lambda: naive.dense_dechunk(padded, probability, order, real, keep, side),
            },
            rounds=rounds,
        )
    return {
        "batch": batch,
        "grid": grid,
        "times": times,
        "speedup": timing.ratio(times, "dense", "tokdyn"),
        "bar": BARS[side],
        "largest_difference": (ours - theirs).abs().max().item(),
    }


def dechunk_memory() -> float:
    """Measure the peak MiB that de-chunking with gradients adds at 128x128, batch 2, in a fresh process."""
    features, probability, keep, *_ = dechunk_case(2, 128)
    features.requires_grad_()
    probability.requires_grad_()

    def run() -> None:
        ops.dechunk(features, probability, keep, (128, 128), 1.0).square().mean().backward()

    return timing.peak_growth_mib(run)


class Stopwatch:
    """Sum up the time spent inside some modules."""

    def __init__(self, modules: torch.nn.ModuleList) -> None:
        import time

        self.clock = time.perf_counter
        self.total = 0.0
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self._start())
            module.register_forward_hook(lambda *_: self._stop())

    def _start(self) -> None:
        self.began = self.clock()

    def _stop(self) -> None:
        self.total += self.clock() - self.began


def outside_share(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure the share of a DC-DiT-S forward that is spent outside the blocks: batch 8, a quarter kept."""
    import time

    torch.manual_seed(0)
    model = DCDiT.named("S").eval()
    x, steps, labels = torch.randn(8, 4, 32, 32), torch.randint(1000, (8,)), torch.randint(1000, (8,))
    model.calibrate_router(x, steps, labels)
    model, x = model.to(dtype), x.to(dtype)
    watch = Stopwatch(model.blocks)
    shares, totals = [], []
    with torch.no_grad():
        kept = model(x, steps, labels).routing.kept.float().mean().item()
        for _ in range(rounds + 2):
            watch.total = 0.0
            start = time.perf_counter()
            model(x, steps, labels)
            totals.append(time.perf_counter() - start)
            shares.append(1 - watch.total / totals[-1])
    middle = sorted(shares[2:])[rounds // 2]
    return {"kept": kept, "median_ms": sorted(totals[2:])[rounds // 2] * 1e3, "outside_share": middle, "bar": 0.25}


def packed_blocks(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Measure the blocks of DC-DiT-S on packed rows against all 1024 tokens, also in plain PyTorch, batch 8.

    bf16 is autocast as the model would compute it, in fp32 on a CPU without instructions for bf16.
    """
    torch.manual_seed(0)
    model = DCDiT.named("S").eval()
    blocks = model.blocks
    keep = torch.rand(8, 1024) < 0.246
    packing = ops.pack(keep, (32, 32))
    condition = torch.randn(8, 384)

    def run(x: torch.Tensor, plan: Any) -> None:
        for block in blocks:
            x = block(x, condition, plan)

    def plain(x: torch.Tensor) -> None:
        for block in blocks:
            x = official.dense_block(block, x, condition)

    with sampling("bf16" if dtype == torch.bfloat16 else "fp32"):
        precision, dense = model._compute_precision(torch.randn(8, 1024, 384))
        rows = dense.flatten(0, 1).index_select(0, packing.index)
        sides = {"packed": lambda: run(rows, packing), "dense": lambda: run(dense, None), "plain": lambda: plain(dense)}
        with precision:
            times = timing.in_turn(sides, rounds=rounds)
    linear, pairs = 24 * 384 * 384, 4 * 384
    dense_flops = 8 * (1024 * linear + 1024**2 * pairs)
    packed_flops = packing.total * linear + sum(n * n for n in packing.lengths) * pairs
    speedup = timing.ratio(times, "dense", "packed")
    return {
        "kept": packing.total / 8,
        "times": times,
        "flop_ratio": dense_flops / packed_flops,
        "speedup": speedup,
        "realised": speedup * packed_flops / dense_flops,
        "realised_over_plain": timing.ratio(times, "plain", "packed") * packed_flops / dense_flops,
        "bar": 0.95 if dtype == torch.float32 else 0.85,
    }


def in_processes(dtype: torch.dtype, rounds: int, processes: int) -> dict[str, Any]:
    """Run `packed_blocks` in several processes: where their memory lies moves the ratio by a few percent."""
    name = str(dtype).removeprefix("torch.")
    threads = str(torch.get_num_threads())
    options = ["--packed-only", name, "--rounds", str(rounds), "--threads", threads]
    child = [sys.executable, "-m", "benchmarks.flagship", *options]
    runs = [
        json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout) for _ in range(processes)
    ]
    runs.sort(key=lambda run: run["realised"])
    return {**runs[len(runs) // 2], "realised_in_each_process": [run["realised"] for run in runs]}


def main() -> int:
    """Measure everything, print it and save it."""
    parser = command_line.parser(__doc__, rounds=9)
    parser.add_argument("--processes", type=int, default=5, help="to measure packed blocks in; the median counts")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--packed-only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_only:
        print(dechunk_memory())
        return 0
    command_line.start(given)
    if given.packed_only:
        print(json.dumps(packed_blocks(getattr(torch, given.packed_only), given.rounds)))
        return 0
    result: dict[str, Any] = {"machine": timing.machine(), "unit": "milliseconds; a multiply-add is 2 FLOPs"}
    result["dechunk"] = [
        dechunk(b, side, max(3, given.rounds // f)) for b, side, f in ((8, 32, 1), (2, 64, 1), (2, 128, 3))
    ]
    child = [sys.executable, "-m", "benchmarks.flagship", "--memory-only"]
    result["dechunk_memory_mib"] = {"grid": [128, 128], "batch": 2, "value": 0.0, "bar": 400}
    result["dechunk_memory_mib"]["value"] = float(subprocess.run(child, check=True, capture_output=True).stdout)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        result[f"outside_{name}"] = outside_share(dtype, given.rounds)
        result[f"packed_{name}"] = in_processes(dtype, max(3, given.rounds // 2), given.processes)
    misses = []
    for row in result["dechunk"]:
        print(
            f"de-chunk {row['grid']}: {row['speedup']:.1f}x, {row['largest_difference']:.1e} apart (bar {row['bar']}x)"
        )
        if row["speedup"] < row["bar"] or row["largest_difference"] > 1e-6:
            misses.append(f"de-chunk {row['grid']}")
    memory = result["dechunk_memory_mib"]
    print(f"de-chunk 128x128 with gradients: {memory['value']:.0f} MiB (bar {memory['bar']})")
    misses += ["de-chunk memory"] * (memory["value"] > memory["bar"])
    for name in ("fp32", "bf16"):
        outside, packed = result[f"outside_{name}"], result[f"packed_{name}"]
        print(f"{name}: {outside['outside_share']:.1%} outside the blocks of DC-DiT-S, {outside['median_ms']:.0f} ms")
        print(f"{name}: packed blocks {packed['speedup']:.2f}x, {packed['realised']:.1%} of the FLOP ratio "
              f"{packed['flop_ratio']:.2f} (bar {packed['bar']:.0%}), {packed['realised_over_plain']:.1%} over plain "
              f"blocks ({', '.join(f'{each:.1%}' for each in packed['realised_in_each_process'])})")  # fmt: skip
        misses += [f"packed blocks {name}"] * (packed["realised"] < packed["bar"])
    misses += ["share outside the blocks"] * (result["outside_fp32"]["outside_share"] > 0.25)
    result["missed"] = misses
    if given.out:
        timing.write(given.out, result)
    return command_line.finish(misses)


if __name__ == "__main__":
    sys.exit(main())
