"""Which attention path is fastest for ragged rows: the measurements behind the thresholds of `tokdyn.ops.attention`.

    python -m benchmarks.attention --out benchmarks/results/attention-cpu.json

Eight samples, 6 heads of 64, forward and with gradients, fp32 and bf16. For samples of different length: one call a
sample against padding to the longest, with other lengths in every round, as a router makes them: kernels that are
compiled for each new length show what that costs. For equal ones: the fused kernel against two matrix products. "auto"
is what tokdyn chooses by itself. Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokdyn import ops
from tokdyn.bench import timing
from tokdyn.tokens import Packing

HEADS, WIDTH, SAMPLES = 6, 384, 8
ROWS = (32, 64, 128, 192, 256, 512)
SPREADS = (0.15, 0.8)
ROUNDS, WARMUP = 7, 2


def ragged(spread: float, rows: int, dtype: torch.dtype, train: bool) -> dict[str, Any]:
    """Samples of `rows` tokens, a share of them more or less: one call a sample against padding to the longest."""
    torch.manual_seed(rows)

    def drawn() -> tuple[Packing, Tensor]:
        lengths = (rows * (1 + spread * (2 * torch.rand(SAMPLES) - 1))).long()
        packing = ops.pack(torch.arange(2 * rows) < lengths[:, None], (2 * rows,))
        return packing, torch.randn(packing.total, 3 * WIDTH).to(dtype).requires_grad_(train)

    def side(backend: Literal["auto", "split", "padded"]) -> Callable[[], None]:
        calls = iter([drawn() for _ in range(ROUNDS + WARMUP)])  # of its own: nothing another side made is there yet

        def run() -> None:
            packing, qkv = next(calls)
            with ops.attention_backend(backend):
                step(lambda: ops.packed_attention(qkv, HEADS, packing), qkv, train)

        return run

    names: tuple[Literal["auto", "split", "padded"], ...] = ("split", "padded", "auto")
    times = timing.in_turn({name: side(name) for name in names}, rounds=ROUNDS, warmup=WARMUP)
    return {**row("ragged", rows, dtype, train, times), "spread": spread}


def equal(rows: int, dtype: torch.dtype, train: bool) -> dict[str, Any]:
    """Samples of exactly `rows` tokens: the fused kernel against two matrix products."""
    torch.manual_seed(rows)
    qkv = torch.randn(SAMPLES, rows, 3 * WIDTH).to(dtype).requires_grad_(train)

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = qkv.view(SAMPLES, rows, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(*parts())

    def products() -> Tensor:
        query, key, value = parts()
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return scores.softmax(-1) @ value

    sides = {"fused": fused, "products": products, "auto": lambda: ops.dense_attention(qkv, HEADS)}
    runs = {name: partial(step, side, qkv, train) for name, side in sides.items()}
    return row("equal", rows, dtype, train, timing.in_turn(runs, ROUNDS, WARMUP))


def step(run: Callable[[], Tensor], source: Tensor, train: bool) -> None:
    """One forward, and the gradient of the source if it trains."""
    with torch.set_grad_enabled(train):
        out = run()
        if train:
            torch.autograd.grad(out.sum(), source)


def row(kind: str, rows: int, dtype: torch.dtype, train: bool, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One line of the table."""
    medians = {name: entry["median_ms"] for name, entry in times.items()}
    return {
        "samples": kind,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "train": train,
        "median_ms": medians,
        "auto_over_best": medians["auto"] / min(medians.values()),
    }


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="save the result as JSON")
    given = parser.parse_args()
    timing.prepare()
    kinds: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
        f"ragged, {spread:.0%} more or less": (partial(ragged, spread), ("split", "padded", "auto"))
        for spread in SPREADS
    }
    kinds["equal"] = (equal, ("fused", "products", "auto"))
    results = []
    for title, (measure, names) in kinds.items():
        table = Table("type", "gradients", "rows", *names, title=f"{title}: milliseconds, median of {ROUNDS}")
        for dtype in (torch.float32, torch.bfloat16):
            for train in (False, True):
                for rows in ROWS:
                    result = measure(rows, dtype, train)
                    results.append(result)
                    times = [f"{result['median_ms'][name]:.2f}" for name in names]
                    table.add_row(result["dtype"], "yes" if train else "no", str(rows), *times)
        Console().print(table)
    if given.out:
        timing.write(given.out, {"machine": timing.machine(), "rows": results})


if __name__ == "__main__":
    main()
