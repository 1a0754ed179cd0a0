"""Token merging at ratio 0.5: against tomesd on the same tensors, and its overhead in a model beside what it saves.

    pip install -e '.[bench]'
    python -m benchmarks.merging --out benchmarks/results/merging-cpu.json

First match, merge and unmerge, choosing destinations anew each time, against tomesd 0.1.3, which is called directly
because its patch does nothing on these models. Then four DiT-XL/2 blocks (width 1152, 16 heads), in tokdyn's DiT and
in that of diffusers. Overhead is how much longer a wrapped model takes than one whose attention saw half of the
tokens at no cost, as a share of what that attention saves. Takes about six minutes on two idle cores, and several
times as long if the CPU has no instructions for bf16. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokdyn
from benchmarks import command_line
from tokdyn import TokenMerge
from tokdyn.bench import timing
from tokdyn.ops.destinations import grid_destinations
from tokdyn.ops.merging import match, merge, unmerge
from tokdyn.ops.windows import tiling

RATIO = 0.5
SPEEDUPS = {(32, "float32"): 2.2, (32, "bfloat16"): 4.0, (64, "float32"): 1.7, (64, "bfloat16"): 3.0}
OVERHEAD = 1 / 3  # of what attention on fewer tokens saves
DTYPES = (torch.float32, torch.bfloat16)


def ours(x: Tensor, side: int, whole: bool = False) -> Tensor:
    """Merge the tokens of (B, N, D) on a square grid, and give every token the result of its group.

    Tokens look for a destination in the default windows of TokenMerge, or in the whole grid as those of tomesd do.
    """
    batch, count, width = x.shape
    rows = x.view(-1, width)
    tiles = None if whole else tiling((side, side), (2, 2), None)
    plan = match(rows, [count] * batch, grid_destinations(batch, (side, side), x.device, tiling=tiles), RATIO)
    return unmerge(merge(rows, plan), plan).view_as(x)


def theirs(x: Tensor, side: int) -> Tensor:
    """Do the same with tomesd."""
    from tomesd.merge import bipartite_soft_matching_random2d

    join, spread = bipartite_soft_matching_random2d(x, side, side, 2, 2, int(x.shape[1] * RATIO), no_rand=True)
    out: Tensor = spread(join(x))
    return out


def own(size: int, depth: int) -> nn.Module:
    """Build DiT-XL/2 blocks in tokdyn's DiT."""
    return tokdyn.DiT(sample_size=size, patch_size=2, hidden_size=1152, depth=depth, num_heads=16)


def of_diffusers(size: int, depth: int) -> nn.Module:
    """Build the same blocks in diffusers' DiT."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=size, patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip


def matching(width: int, batch: int, side: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time match, merge and unmerge on the same tokens."""
    torch.manual_seed(0)
    x = torch.randn(batch, side * side, width).to(dtype)
    with torch.no_grad():
        times = timing.in_turn({"tomesd": lambda: theirs(x, side), "tokdyn": lambda: ours(x, side)}, rounds=rounds)
        difference = (ours(x.float(), side, whole=True) - theirs(x.float(), side)).abs().max().item()
    name = str(dtype).removeprefix("torch.")
    return {
        "width": width,
        "batch": batch,
        "tokens": side * side,
        "dtype": name,
        "median_ms": {key: entry["median_ms"] for key, entry in times.items()},
        "speedup": timing.ratio(times, "tomesd", "tokdyn"),
        "bar": SPEEDUPS[side, name],
        "largest_difference_fp32": difference,
    }


def overhead(
    build: Callable[..., nn.Module], batch: int, side: int, dtype: torch.dtype, rounds: int, depth: int = 4
) -> dict[str, Any]:
    """Time a wrapped model, the plain one, and attention of one of its blocks on all and on half of the tokens."""
    torch.manual_seed(0)
    model = build(2 * side, depth).eval().to(dtype)
    inputs = {
        "hidden_states": torch.randn(batch, 4, 2 * side, 2 * side, dtype=dtype),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch),
    }
    block: Any = next(iter(getattr(model, "blocks", None) or model.transformer_blocks))  # type: ignore[arg-type]
    attention = block.attn if hasattr(block, "attn") else block.attn1
    full = torch.randn(batch, side * side, 1152, dtype=dtype)
    half = full[:, : side * side - int(side * side * RATIO)].contiguous()

    def plain() -> Any:
        with tokdyn.disabled(model):
            return model(**inputs)

    with torch.no_grad():
        tokdyn.wrap(model, [TokenMerge(ratio=RATIO)])
        sides = {
            "plain": plain,
            "merged": lambda: model(**inputs),
            "attention": lambda: attention(full),
            "attention on half": lambda: attention(half),
        }
        times = timing.in_turn(sides, rounds=rounds)
    ms = {name: entry["median_ms"] for name, entry in times.items()}
    saving = depth * (ms["attention"] - ms["attention on half"])
    return {
        "model": type(model).__name__,
        "batch": batch,
        "tokens": side * side,
        "blocks": depth,
        "dtype": str(dtype).removeprefix("torch."),
        "median_ms": ms,
        "saving_ms": saving,
        "overhead_ms": ms["merged"] - ms["plain"] + saving,
        "overhead_share": (ms["merged"] - ms["plain"] + saving) / saving,
        "faster": ms["plain"] / ms["merged"],
        "bar": OVERHEAD,
    }


def main() -> int:
    """Measure, print, and save on request."""
    given = command_line.parser(__doc__, rounds=9).parse_args()
    try:
        import tomesd  # noqa: F401
    except ImportError:
        print("this comparison needs tomesd: pip install tomesd==0.1.3", file=sys.stderr)
        return 2
    command_line.start(given)
    parts = [
        matching(width, batch, side, dtype, given.rounds)
        for width in (384, 1152)
        for batch, side in ((8, 32), (2, 64))
        for dtype in DTYPES
    ]
    table = Table(
        "width", "tokens", "type", "tomesd (ms)", "tokdyn (ms)", "faster", "target", title="match, merge, unmerge"
    )
    for row in parts:
        ms = (f"{row['median_ms'][name]:.1f}" for name in ("tomesd", "tokdyn"))
        shape = f"{row['batch']} x {row['tokens']}"
        table.add_row(str(row["width"]), shape, row["dtype"], *ms, f"{row['speedup']:.2f}", f"{row['bar']:.1f}")
    Console().print(table)
    models = [
        overhead(build, batch, side, dtype, max(3, given.rounds // 2))
        for build in (own, of_diffusers)
        for batch, side in ((8, 16), (2, 32))
        for dtype in DTYPES
    ]
    table = Table("model", "tokens", "type", "plain (ms)", "merged (ms)", "saving (ms)", "overhead", title="in a model")
    for row in models:
        ms = (f"{value:.0f}" for value in (row["median_ms"]["plain"], row["median_ms"]["merged"], row["saving_ms"]))
        share = f"{row['overhead_share']:.0%} of it"
        table.add_row(row["model"], f"{row['batch']} x {row['tokens']}", row["dtype"], *ms, share)
    Console().print(table)
    missed = [f"{r['tokens']} tokens, {r['dtype']}, width {r['width']}" for r in parts if r["speedup"] < r["bar"]]
    missed += ["same results" for row in parts if row["largest_difference_fp32"] > 1e-5]
    slow = [row for row in models if row["overhead_share"] > OVERHEAD]
    missed += [f"overhead in {row['model']}, {row['tokens']} tokens, {row['dtype']}" for row in slow]
    if given.out:
        result = {"machine": timing.machine(), "ratio": RATIO, "matching": parts, "models": models, "missed": missed}
        timing.write(given.out, result)
    return command_line.finish(missed)


if __name__ == "__main__":
    sys.exit(main())
