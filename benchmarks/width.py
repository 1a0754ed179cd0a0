"""Half of all attention heads and MLP channels off: how much of the FLOP ratio becomes time.

    python -m benchmarks.width --out benchmarks/results/width-cpu.json

Blocks of DiT-XL/2 (width 1152, 16 heads), six of them, on 256 tokens of eight samples, in tokdyn's DiT and in that of
diffusers, fp32 and bf16. The gates are set by hand; the model is wrapped and called as a user would. "first" is the
first call after other heads were chosen, in which the weights are sliced. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokdyn
from tokdyn import DynamicWidth
from tokdyn.bench import timing
from tokdyn.cost import count

BAR = 0.8  # share of the FLOP ratio
DEPTH, BATCH, SIZE = 6, 8, 32


def own() -> nn.Module:
    """Tokdyn's DiT."""
    return tokdyn.DiT(sample_size=SIZE, patch_size=2, hidden_size=1152, depth=DEPTH, num_heads=16)


def of_diffusers() -> nn.Module:
    """The same model in diffusers."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=DEPTH,
        sample_size=SIZE, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip


def set_gates(model: nn.Module, on: int) -> None:
    """Leave so many heads and groups of channels on in every block, at all noise levels, every other one first."""
    gates: Any = model.tokdyn.parts["0"]
    order = [*range(1, 16, 2), *range(2, 16, 2)]  # the first is always on
    with torch.no_grad():
        for bias in (gates.heads.bias, gates.channels.bias):
            row = torch.full((15,), -1.0)
            row[[place - 1 for place in order[: on - 1]]] = 1.0
            bias.copy_(row.repeat(DEPTH))


def measure(build: Callable[[], nn.Module], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Times of the plain model, of the wrapped one with everything on, and of half of it."""
    torch.manual_seed(0)
    model = build().eval().to(dtype)
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, SIZE, SIZE, dtype=dtype),
        "timestep": torch.full((BATCH,), 500),
        "class_labels": torch.arange(BATCH),
    }

    def plain() -> Tensor:
        with tokdyn.disabled(model):
            return model(**inputs).sample  # type: ignore[no-any-return]

    def half() -> Tensor:
        return model(**inputs).sample  # type: ignore[no-any-return]

    def first() -> Tensor:
        for kernel in model.tokdyn.actors.kernels:  # type: ignore[union-attr]
            kernel.forget()
        return half()

    with torch.no_grad():
        whole = count(model, **inputs)[0]
        tokdyn.wrap(model, [DynamicWidth(tokens=False)])
        set_gates(model, 8)
        ratio = whole / count(model, **inputs)[0]
        times = timing.in_turn({"plain": plain, "half": half, "first": first}, rounds=rounds)
    faster = timing.ratio(times, "plain", "half")
    return {
        "model": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "median_ms": {name: entry["median_ms"] for name, entry in times.items()},
        "flop_ratio": ratio,
        "faster": faster,
        "of_flop_ratio": faster / ratio,
        "first_of_flop_ratio": timing.ratio(times, "plain", "first") / ratio,
    }


def main() -> None:
    """Measure, print, save, and fail below the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="save the result as JSON")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    timing.prepare()
    results = [
        measure(build, dtype, given.rounds)
        for build in (own, of_diffusers)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    table = Table("model", "type", "all on (ms)", "half off (ms)", "faster", "FLOP ratio", "share of it", "first call")
    for row in results:
        ms = row["median_ms"]
        numbers = (f"{row[name]:.2f}" for name in ("faster", "flop_ratio", "of_flop_ratio", "first_of_flop_ratio"))
        table.add_row(row["model"], row["dtype"], f"{ms['plain']:.0f}", f"{ms['half']:.0f}", *numbers)
    Console().print(table)
    if given.out:
        timing.write(given.out, {"machine": timing.machine(), "bar": BAR, "rows": results})
    if any(row["of_flop_ratio"] < BAR for row in results):
        raise SystemExit(f"half of all heads and channels off gives less than {BAR} of the FLOP ratio")


if __name__ == "__main__":
    main()
