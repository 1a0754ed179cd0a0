"""Half of all attention heads and MLP channels gated off: how much of the FLOP ratio becomes time.

    python -m benchmarks.width --out benchmarks/results/width-cpu.json

Six blocks of DiT-XL/2 (width 1152, 16 heads) on 256 tokens of eight samples, in tokdyn's DiT and in that of
diffusers, fp32 and bf16. The gates are set by hand; the model is wrapped and called as a user would. "first" is the
first call after other heads were chosen, which slices the weights. Takes about three minutes on two cores. Exits with
1 if the target is missed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokdyn
from benchmarks import command_line
from tokdyn import DynamicWidth
from tokdyn.bench import timing
from tokdyn.cost import count

TARGET = 0.8  # share of the FLOP ratio
DEPTH, BATCH, SIZE, HEADS = 6, 8, 32, 16


def own() -> nn.Module:
    """Build tokdyn's DiT."""
    return tokdyn.DiT(sample_size=SIZE, patch_size=2, hidden_size=1152, depth=DEPTH, num_heads=HEADS)


def of_diffusers() -> nn.Module:
    """Build the same model in diffusers."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=DEPTH,
        sample_size=SIZE, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip


def set_gates(model: nn.Module, others: list[int]) -> None:
    """Turn on head and channel group 0, which are always on, and `others` in every block at all noise levels."""
    gates: Any
    ((_, gates),) = tokdyn.parts(model)
    row = torch.full((HEADS - 1,), -1.0)
    row[[group - 1 for group in others]] = 1.0
    with torch.no_grad():
        for bias in (gates.heads.bias, gates.channels.bias):
            bias.copy_(row.repeat(DEPTH))


def measure(build: Callable[[], nn.Module], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time the plain model, and the wrapped one with half of its heads and channels, sliced before and anew."""
    torch.manual_seed(0)
    choices = random.Random(0)
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

    def first() -> Tensor:  # leaves the gates as they are, so that `half` finds its weights sliced
        set_gates(model, choices.sample(range(1, HEADS), HEADS // 2 - 1))
        return half()

    with torch.no_grad():
        whole = count(model, **inputs)[0]
        tokdyn.wrap(model, [DynamicWidth(tokens=False)])
        set_gates(model, list(range(1, HEADS - 1, 2)))
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


def main() -> int:
    """Measure, print, and save on request."""
    given = command_line.start(command_line.parser(__doc__, rounds=9).parse_args())
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
        timing.write(given.out, {"machine": timing.machine(), "bar": TARGET, "rows": results})
    return command_line.finish(
        [
            f"{row['model']} {row['dtype']}: {row['of_flop_ratio']:.2f} of {TARGET} of the FLOP ratio"
            for row in results
            if row["of_flop_ratio"] < TARGET
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
