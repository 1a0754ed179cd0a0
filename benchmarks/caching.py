"""Time of wrapping, skipping and caching on CPU: `python -m benchmarks.caching --out results.json`.

Sizes: DiT-XL/2 blocks (width 1152, 16 heads), six of them, on 256 tokens; a Flux of 4 double and 8 single blocks at
width 768; and both tiny. The caches of cache-dit (pip install cache-dit, version 1.5) and of diffusers run on the
same weights with the same computed steps. DBCache and FirstBlockCache always compute the first block, like
FeatureCache(indicator="first_block"); diffusers also compares it in every step. The targets are for FeatureCache with
default settings, whose cached steps skip the first block too. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import tokdyn
from benchmarks import command_line
from tokdyn import DepthSkip, FeatureCache
from tokdyn.adapters import adapter_for
from tokdyn.bench.timing import in_turn, machine, ratio, write

Inputs = Callable[[float], dict[str, Any]]
"""The arguments of a call at a noise level."""
STEPS = 10
COMPUTED = (0, 1, 4, 7, 9)  # the last step is always computed
TARGETS = {
    "empty_over_plain": 0.01, "cached_step_share": 0.03, "skipped_block_share": 0.005, "over_cache_dit": 1.0,
    "over_diffusers": 1.0,
}  # fmt: skip


def dit(blocks: int, heads: int, size: int, head: int = 72) -> nn.Module:
    """Build a DiT of diffusers with random weights."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head, num_layers=blocks, in_channels=4, out_channels=8,
        sample_size=size, patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def flux(double: int, single: int, heads: int, head: int = 64) -> nn.Module:
    """Build a Flux of diffusers with random weights."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    rotary = (head // 8, head // 16 * 7, head // 16 * 7)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=head,
        num_attention_heads=heads, joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=rotary,
    ).eval()  # fmt: skip


def dit_inputs(batch: int, size: int) -> Inputs:
    """Build the inputs of a DiT."""
    x = torch.randn(batch, 4, size, size)
    labels = torch.arange(batch)
    return lambda level: {
        "hidden_states": x,
        "timestep": torch.full((batch,), int(999 * level)),
        "class_labels": labels,
    }


def flux_inputs(side: int, text: int = 32) -> Inputs:
    """Build the inputs of a Flux for one image of side x side tokens."""
    x, text_tokens, pooled = torch.randn(1, side * side, 16), torch.randn(1, text, 64), torch.randn(1, 32)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    ids = torch.cat([torch.zeros(side * side, 1), places], dim=1)
    return lambda level: {
        "hidden_states": x,
        "encoder_hidden_states": text_tokens,
        "pooled_projections": pooled,
        "timestep": torch.full((1,), level),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def trajectory(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """Return a function that runs all steps."""
    calls = [inputs(1.0 - step / STEPS) for step in range(STEPS)]

    @torch.no_grad()
    def run() -> None:
        for arguments in calls:
            model(**arguments)

    return run


def call(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """Return a function that calls the model once."""
    arguments = inputs(0.5)

    @torch.no_grad()
    def run() -> Any:
        return model(**arguments)

    return run


def own_costs(
    build: Callable[[], nn.Module], narrow: Callable[[int], nn.Module], inputs: Inputs, rounds: int
) -> dict[str, Any]:
    """Time an empty wrap and a cached step as shares of the plain call, and a skipped block as a share of a block."""
    plain, empty = build(), tokdyn.wrap(build(), [])
    cached = tokdyn.wrap(build(), [FeatureCache(threshold=float("inf"))])
    depth = plain_depth(plain)
    one_block = tokdyn.wrap(build(), [DepthSkip(blocks=tuple(range(1, depth)))])
    no_block = tokdyn.wrap(build(), [DepthSkip(blocks=tuple(range(depth)))])
    steps = iter([inputs(0.9 - 0.002 * step) for step in range(rounds + 5)])

    @torch.no_grad()
    def step() -> Any:
        return cached(**next(steps))

    step()  # the first step is computed

    times = in_turn(
        {
            "plain": call(plain, inputs),
            "empty": call(empty, inputs),
            "cached step": step,
            "one block": call(one_block, inputs),
            "no block": call(no_block, inputs),
        },
        rounds,
    )
    ms = {name: each["median_ms"] for name, each in times.items()}
    block = (ms["plain"] - ms["no block"]) / depth
    return {
        "times": times,
        "empty_over_plain": ratio(times, "empty", "plain") - 1,
        "cached_step_share": ms["cached step"] / ms["plain"],
        "skipped_block_share": skipped_block_ms(narrow, inputs, rounds) / block,
    }


def plain_depth(model: nn.Module) -> int:
    """Count the blocks of a model."""
    return sum(len(getattr(model, stack.path)) for stack in adapter_for(model).blocks)


def skipped_block_ms(narrow: Callable[[int], nn.Module], inputs: Inputs, rounds: int) -> float:
    """Time a skipped block in milliseconds, as the difference between deep and shallow models that skip all blocks.

    Their width does not matter, since nothing is computed, and narrow models fit into memory at any depth.
    """
    models = {depth: narrow(depth) for depth in (4, 68)}
    calls = {
        str(depth): call(tokdyn.wrap(model, [DepthSkip(blocks=tuple(range(depth)))]), inputs)
        for depth, model in models.items()
    }
    times = in_turn(calls, 3 * rounds)
    return (times["68"]["median_ms"] - times["4"]["median_ms"]) / 64


def peers(build: Callable[[], nn.Module], inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Time trajectories with the same computed steps, cached by tokdyn, cache-dit and diffusers."""
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
        key = name.replace("-", "_")
        found[f"first_block_over_{key}"] = ratio(times, "tokdyn first block", name)
        found[f"over_{key}"] = ratio(times, "tokdyn", name)
    return found


def diffusers_cache(model: nn.Module, inputs: Inputs) -> Callable[[], None] | None:
    """Run the trajectory with the first-block cache of diffusers; None for models that it does not support.

    It accepts no list of steps, so its threshold is set before every call to what makes it compute or reuse.
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


def cache_dit(model: nn.Module, inputs: Inputs) -> Callable[[], None] | None:
    """Run the trajectory with cache-dit; None if it is not installed."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    try:
        import cache_dit as peer
    except ImportError:
        return None
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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and save on request."""
    options = command_line.start(command_line.parser(__doc__, rounds=9).parse_args(argv))
    cases = {
        "dit-tiny": (lambda: dit(4, 2, 16, 16), lambda depth: dit(depth, 1, 16, 16), dit_inputs(2, 16)),
        "dit-1152x6": (lambda: dit(6, 16, 32), lambda depth: dit(depth, 1, 32, 16), dit_inputs(2, 32)),
        "flux-tiny": (lambda: flux(2, 2, 2, 32), _narrow_flux, flux_inputs(8)),
        "flux-768x12": (lambda: flux(4, 8, 12), _narrow_flux, flux_inputs(16)),
    }
    result: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "cases": {}}
    for name, (build, narrow, inputs) in cases.items():
        own, others = own_costs(build, narrow, inputs, options.rounds), peers(build, inputs, options.rounds)
        result["cases"][name] = {"own": own, "peers": others}
        print(
            f"{name:<12} empty {own['empty_over_plain']:+.2%}  cached step {own['cached_step_share']:.2%} of a step  "
            f"skipped block {own['skipped_block_share']:.2%} of a block"
        )
        for peer in ("cache_dit", "diffusers"):
            if f"over_{peer}" in others:
                print(
                    f"{'':<12} time over {peer.replace('_', '-')}: {others[f'first_block_over_{peer}']:.2f} with the "
                    f"first block, {others[f'over_{peer}']:.2f} without"
                )
    missed = missed_targets(result["cases"])
    if options.out:
        write(options.out, {**result, "bars": TARGETS, "missed": missed})
    return command_line.finish(missed)


def _narrow_flux(depth: int) -> nn.Module:
    return flux(depth // 2, depth // 2, 1, 32)


def missed_targets(cases: dict[str, Any]) -> list[str]:
    """List the missed targets. Shares count only for real sizes, comparisons with other caches for all."""
    missed = []
    for name, found in cases.items():
        own = found["own"] if not name.endswith("tiny") else {}
        for target, most in TARGETS.items():
            value = {**own, **found["peers"]}.get(target)
            if value is not None and value > most:
                missed.append(f"{name} {target} {value:.4g} of {most}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
