"""What wrapping, skipping and caching cost on CPU: `python -m benchmarks.caching --out results.json`.

Sizes: DiT-XL/2 blocks (width 1152, 16 heads) cut to 6, 256 tokens; a Flux of 4 double and 8 single blocks at width 768;
and both tiny. The caches of cache-dit (pip install cache-dit, version 1.5) and of diffusers run on the same weights
with the same steps computed: DBCache and FirstBlockCache always compute the first block, as
FeatureCache(indicator="first_block") does; diffusers compares it in every step, too. The bars are for FeatureCache as
it is by default, which repeats the first block with the others.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import tokdyn
from tokdyn import DepthSkip, FeatureCache
from tokdyn.bench.timing import in_turn, machine, prepare, ratio, write

STEPS = 10
COMPUTED = (0, 1, 4, 7, 9)  # the last one always is


def dit(blocks: int, heads: int, size: int, head: int = 72) -> nn.Module:
    """A DiT of diffusers with random weights."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head, num_layers=blocks, in_channels=4, out_channels=8,
        sample_size=size, patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def flux(double: int, single: int, heads: int, head: int = 64) -> nn.Module:
    """A Flux of diffusers with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    rotary = (head // 8, head // 16 * 7, head // 16 * 7)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=head,
        num_attention_heads=heads, joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=rotary,
    ).eval()  # fmt: skip


def dit_inputs(batch: int, size: int) -> Callable[[float], dict[str, Any]]:
    """Arguments of a call at a noise level."""
    x = torch.randn(batch, 4, size, size)
    labels = torch.arange(batch)
    return lambda level: {
        "hidden_states": x,
        "timestep": torch.full((batch,), int(999 * level)),
        "class_labels": labels,
    }


def flux_inputs(side: int, text: int = 32) -> Callable[[float], dict[str, Any]]:
    """The same for Flux: one image of side x side tokens."""
    x, words, pooled = torch.randn(1, side * side, 16), torch.randn(1, text, 64), torch.randn(1, 32)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    ids = torch.cat([torch.zeros(side * side, 1), places], dim=1)
    return lambda level: {
        "hidden_states": x,
        "encoder_hidden_states": words,
        "pooled_projections": pooled,
        "timestep": torch.full((1,), level),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def trajectory(model: nn.Module, inputs: Callable[[float], dict[str, Any]]) -> Callable[[], None]:
    """A run of all steps."""
    calls = [inputs(1.0 - step / STEPS) for step in range(STEPS)]

    @torch.no_grad()
    def run() -> None:
        for arguments in calls:
            model(**arguments)

    return run


def call(model: nn.Module, inputs: Callable[[float], dict[str, Any]]) -> Callable[[], Any]:
    """One call."""
    arguments = inputs(0.5)

    @torch.no_grad()
    def run() -> Any:
        return model(**arguments)

    return run


def own_costs(build: Callable[[], nn.Module], inputs: Callable[[float], dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Wrapping with nothing, a step that a cache repeats, and a block that is skipped, as shares of the plain call."""
    plain, empty = build(), tokdyn.wrap(build(), [])
    cached = tokdyn.wrap(build(), [FeatureCache(threshold=float("inf"))])
    depth = plain_depth(plain)
    skipped = tokdyn.wrap(build(), [DepthSkip(blocks=tuple(range(1, depth)))])
    one = tokdyn.wrap(build(), [DepthSkip(blocks=tuple(range(depth)))])
    steps = iter([inputs(0.9 - 0.002 * step) for step in range(rounds + 5)])

    @torch.no_grad()
    def step() -> Any:
        return cached(**next(steps))

    step()  # the first one is computed

    times = in_turn(
        {
            "plain": call(plain, inputs),
            "empty": call(empty, inputs),
            "cached step": step,
            "one block": call(skipped, inputs),
            "no block": call(one, inputs),
        },
        rounds,
    )
    ms = {name: each["median_ms"] for name, each in times.items()}
    block = (ms["plain"] - ms["no block"]) / depth
    return {
        "times": times,
        "empty_over_plain": ratio(times, "empty", "plain") - 1,
        "cached_step_share": ms["cached step"] / ms["plain"],
        "skipped_block_share": dispatch(one, inputs(0.5)) / block,
    }


def plain_depth(model: nn.Module) -> int:
    """Blocks of a model."""
    from tokdyn.adapters import adapter_for

    return sum(len(getattr(model, stack.path)) for stack in adapter_for(model).blocks)


def dispatch(model: nn.Module, arguments: dict[str, Any]) -> float:
    """Milliseconds that a skipped block takes."""
    from tokdyn.attach.run import Run

    from tokdyn.adapters import adapter_for
    from tokdyn.attach import class_swap
    from tokdyn.tokens import cells

    stack = adapter_for(model).blocks[0]
    block = getattr(model, stack.path)[0]
    run = Run(model, model.tokdyn, arguments)
    x = torch.zeros(1, cells(run.grid), 16)
    given = {stack.tokens: x} | ({} if stack.text is None else {stack.text: x})
    before = class_swap.enter(run)
    try:
        times = in_turn({"block": lambda: [block(**given) for _ in range(200)]}, 9)
    finally:
        class_swap.enter(before)
    return times["block"]["median_ms"] / 200


def peers(build: Callable[[], nn.Module], inputs: Callable[[float], dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Trajectories with the same steps computed, cached by tokdyn and by cache-dit."""
    ours = tokdyn.wrap(build(), [FeatureCache(indicator="first_block", steps=COMPUTED)])
    whole = tokdyn.wrap(build(), [FeatureCache(steps=COMPUTED)])
    sides = {
        "plain": trajectory(build(), inputs),
        "tokdyn first block": trajectory(ours, inputs),
        "tokdyn": trajectory(whole, inputs),
    }
    others = {"cache-dit": cache_dit(build(), inputs), "diffusers": diffusers_cache(build(), inputs)}
    sides |= {name: run for name, run in others.items() if run is not None}
    times = in_turn(sides, rounds)
    found: dict[str, Any] = {"times": times, "computed": len(COMPUTED), "steps": STEPS}
    for name in others.keys() & sides.keys():
        found[f"first_block_over_{name.replace('-', '_')}"] = ratio(times, "tokdyn first block", name)
        found[f"over_{name.replace('-', '_')}"] = ratio(times, "tokdyn", name)
    return found


BARS = {
    "empty_over_plain": 0.01, "cached_step_share": 0.03, "skipped_block_share": 0.005, "over_cache_dit": 1.0,
    "over_diffusers": 1.0,
}  # fmt: skip


def diffusers_cache(model: nn.Module, inputs: Callable[[float], dict[str, Any]]) -> Callable[[], None] | None:
    """The same trajectory with the first-block cache of diffusers, None for models that it does not take.

    It has no list of steps, so its threshold is set before every call to what makes it compute or repeat.
    """
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook

    if not hasattr(model, "enable_cache"):
        return None
    model.enable_cache(FirstBlockCacheConfig())
    hooks = [each for module in model.modules() if hasattr(module, "_diffusers_hook")
             for each in module._diffusers_hook.hooks.values()]  # fmt: skip
    (head,) = (each for each in hooks if isinstance(each, FBCHeadBlockHook))
    calls = [inputs(1.0 - step / STEPS) for step in range(STEPS)]

    @torch.no_grad()
    def run() -> None:
        model._reset_stateful_cache()
        for step, arguments in enumerate(calls):
            head.threshold = -1.0 if step in COMPUTED else float("inf")
            with model.cache_context("cond"):
                model(**arguments)

    return run


def cache_dit(model: nn.Module, inputs: Callable[[float], dict[str, Any]]) -> Callable[[], None] | None:
    """The same trajectory with cache-dit, None where it is not installed."""
    try:
        import cache_dit as peer
    except ImportError:
        return None
    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    mask = [int(step in COMPUTED) for step in range(STEPS)]
    config = peer.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=0, residual_diff_threshold=1e9,
        num_inference_steps=STEPS, steps_computation_mask=mask, steps_computation_policy="static",
        enable_separate_cfg=False,
    )  # fmt: skip
    peer.enable_cache(model, cache_config=config)
    run = trajectory(model, inputs)

    def fresh() -> None:
        peer.refresh_context(model, cache_config=config, verbose=False)
        run()

    return fresh


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(argv)
    prepare(options.threads)
    cases = {
        "dit-tiny": (lambda: dit(4, 2, 16, 16), dit_inputs(2, 16)),
        "dit-1152x6": (lambda: dit(6, 16, 32), dit_inputs(2, 32)),
        "flux-tiny": (lambda: flux(2, 2, 2, 32), flux_inputs(8)),
        "flux-768x12": (lambda: flux(4, 8, 12), flux_inputs(16)),
    }
    result: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "cases": {}}
    for name, (build, inputs) in cases.items():
        found = {"own": own_costs(build, inputs, options.rounds), "peers": peers(build, inputs, options.rounds)}
        result["cases"][name] = found
        own = found["own"]
        print(
            f"{name:<12} empty {own['empty_over_plain']:+.2%}  cached step {own['cached_step_share']:.2%} of a step  "
            f"skipped block {own['skipped_block_share']:.2%} of a block"
        )
        for peer in ("cache_dit", "diffusers"):
            if f"over_{peer}" in found["peers"]:
                print(
                    f"{'':<12} time over {peer.replace('_', '-')}: {found['peers'][f'first_block_over_{peer}']:.2f} "
                    f"with the first block, {found['peers'][f'over_{peer}']:.2f} without"
                )
    missed = missed_bars(result["cases"])
    if options.out:
        write(options.out, {**result, "bars": BARS, "missed": missed})
    if missed:
        raise SystemExit(f"missed: {'; '.join(missed)}")


def missed_bars(cases: dict[str, Any]) -> list[str]:
    """Shares of a step and of a block where those have a real size; beside cache-dit everywhere."""
    missed = []
    for name, found in cases.items():
        measured = found["own"] if not name.endswith("tiny") else {}
        for bar, most in BARS.items():
            value = {**measured, **found["peers"]}.get(bar)
            if value is not None and value > most:
                missed.append(f"{name} {bar} {value:.4g} of {most}")
    return missed


if __name__ == "__main__":
    main()
