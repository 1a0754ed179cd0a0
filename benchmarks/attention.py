"""Measure the attention paths for packed tokens; the thresholds of `tokdyn.ops.cpu.attention` follow from the result.

    python -m benchmarks.attention --out benchmarks/results/attention-cpu.json

Eight samples, 6 heads of 64, with and without gradients, fp32 and bf16. For samples of different length: one call per
sample against padding to the longest. Lengths change in every round, as those of a router do, so that kernels which are
compiled for each new length pay for that. For samples of equal length: the fused kernel against two matrix products.
"auto" is the choice of tokdyn. Takes about two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks import command_line, markdown
from tokdyn import ops
from tokdyn.bench import timing
from tokdyn.ops.attention import Backend
from tokdyn.progress import progress
from tokdyn.tokens import Packing

HEADS, WIDTH, SAMPLES = 6, 384, 8
ROWS = (32, 64, 128, 256, 512)
SPREADS = (0.15, 0.8)
ROUNDS, WARMUP = 7, 2


def ragged(spread: float, rows: int, dtype: torch.dtype, train: bool) -> dict[str, Any]:
    """Measure one call per sample against padding, for samples of `rows` tokens, up to a share more or less."""
    torch.manual_seed(rows)

    def draw() -> tuple[Packing, Tensor]:
        lengths = (rows * (1 + spread * (2 * torch.rand(SAMPLES) - 1))).long()
        packing = ops.pack(torch.arange(2 * rows) < lengths[:, None], (2 * rows,))
        return packing, torch.randn(packing.total, 3 * WIDTH).to(dtype).requires_grad_(train)

    def side(backend: Backend) -> Callable[[], None]:
        calls = iter([draw() for _ in range(ROUNDS + WARMUP)])  # own ones: no kernel is compiled for them yet

        def run() -> None:
            packing, qkv = next(calls)
            with ops.attention_backend(backend):
                step(lambda: ops.packed_attention(qkv, HEADS, packing), qkv, train)

        return run

    names: tuple[Backend, ...] = ("split", "padded", "auto")
    times = timing.in_turn({name: side(name) for name in names}, rounds=ROUNDS, warmup=WARMUP)
    return {**row("ragged", rows, dtype, train, times), "spread": spread}


def equal(rows: int, dtype: torch.dtype, train: bool) -> dict[str, Any]:
    """Measure the fused kernel against two matrix products, for samples of `rows` tokens."""
    torch.manual_seed(rows)
    qkv = torch.randn(SAMPLES, rows, 3 * WIDTH).to(dtype).requires_grad_(train)

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=HEADS).unbind(0)
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
    """Run forward, and compute the gradient of the source if it trains."""
    with torch.set_grad_enabled(train):
        out = run()
        if train:
            torch.autograd.grad(out.sum(), source)


def row(kind: str, rows: int, dtype: torch.dtype, train: bool, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Build one row of the table."""
    medians = {name: entry["median_ms"] for name, entry in times.items()}
    return {
        "samples": kind,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "train": train,
        "median_ms": medians,
        "auto_over_best": medians["auto"] / min(medians.values()),
    }


def table(rows: list[dict[str, Any]], samples: str) -> str:
    """Format rows as the Markdown table of docs/performance.md."""
    selected = [row for row in rows if row["samples"] == samples]
    names = list(selected[0]["median_ms"])
    spread = ["more or less"] if samples == "ragged" else []
    lines = []
    for each in selected:
        about = [each["dtype"], "yes" if each["train"] else "no", str(each["rows"])]
        about += [f"{each['spread']:.0%}"] if spread else []
        lines.append(about + [f"{each['median_ms'][name]:.2f}" for name in names])
    return markdown.table(["type", "gradients", "rows", *spread, *names], lines)


def main() -> None:
    """Measure everything, print it and save it."""
    given = command_line.start(command_line.parser(__doc__).parse_args())
    cases = list(product((torch.float32, torch.bfloat16), (False, True), ROWS))
    rows = []
    with progress("attention", len(cases) * (1 + len(SPREADS))) as advance:
        for dtype, train, length in cases:
            rows += [ragged(spread, length, dtype, train) for spread in SPREADS] + [equal(length, dtype, train)]
            advance(1 + len(SPREADS))
    print(table(rows, "ragged"), table(rows, "equal"), sep="\n\n")
    if given.out:
        timing.write(given.out, {"machine": timing.machine(), "rows": rows})


if __name__ == "__main__":
    main()
