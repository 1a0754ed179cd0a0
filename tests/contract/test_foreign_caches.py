"""Caches of diffusers are enabled before or after wrapping with the same result, or refused in words."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import tokdyn
from tests.contract.pipelines import build, images
from tokdyn import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenMerge

FIRST = diffusers.FirstBlockCacheConfig(threshold=0.2)
EVERY = diffusers.FirstBlockCacheConfig(threshold=100.0)  # which takes every step but the first from the cache
TAYLOR = diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1)
BROADCAST = diffusers.PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
)
MAG = diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4))
ACTING = {"Wan": FIRST, "Flux": EVERY}  # a cache that changes the images of a pipeline
METHODS: dict[str, list[Any]] = {
    "merge": [TokenMerge(ratio=0.5)],
    "merge, matched in every other step": [TokenMerge(ratio=0.5, reuse_steps=2)],
    "skip": [DepthSkip(blocks=(1,))],
    "width": [DynamicWidth(target=0.5)],
}


@pytest.mark.parametrize("name", ACTING)
@pytest.mark.parametrize("methods", METHODS.values(), ids=list(METHODS))
def test_the_order_of_wrapping_and_caching_is_free(name: str, methods: list[Any]) -> None:
    early, late = build(name), build(name)
    plain = images(early, name)
    early.transformer.enable_cache(ACTING[name])
    cached = images(early, name)
    assert not torch.equal(cached, plain)
    for pipe in (early, late):
        torch.manual_seed(0)  # of the router
        tokdyn.wrap(pipe, methods)
    without = images(late, name)
    late.transformer.enable_cache(ACTING[name])
    found = images(late, name)
    assert torch.equal(images(early, name), found)
    assert not torch.equal(found, without)
    late.transformer.disable_cache()
    assert torch.equal(images(late, name), without)
    assert torch.equal(images(tokdyn.unwrap(early), name), cached)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (FeatureCache(threshold=0.1), FIRST),
        (FeatureCache(steps=(0, 2)), TAYLOR),
        (DepthSkip(blocks=(0,)), FIRST),
        (DepthSkip(blocks=(3,), levels=(0.2, 0.4)), FIRST),
        (DepthSkip(table=((0.5, 1.0, (1, -1)),)), MAG),
        (DepthSkip(learned=True), MAG),
        (TokenMerge(ratio=0.5), TAYLOR),
        (TokenMerge(ratio=0.5), BROADCAST),
        (Chunking(target=2), FIRST),
    ],
    ids=[
        "two caches",
        "two caches, listed steps",
        "first block",
        "last block",
        "last block, table",
        "learned",
        "other merged tokens",
        "other merged tokens, broadcast",
        "other kept tokens",
    ],
)
def test_what_cannot_go_together_is_refused_in_either_order(method: Any, config: Any) -> None:
    pipe = build("Flux")
    tokdyn.wrap(pipe, [method])
    with pytest.raises(tokdyn.InputError, match=type(config).__name__):
        pipe.transformer.enable_cache(config)
    assert not pipe.transformer.is_cache_enabled
    tokdyn.unwrap(pipe)
    pipe.transformer.enable_cache(config)
    kind = type(pipe.transformer)
    with pytest.raises(tokdyn.InputError, match=type(method).__name__):
        tokdyn.wrap(pipe, [method])
    assert type(pipe.transformer) is kind
    assert not hasattr(pipe.transformer, "tokdyn")


@torch.no_grad()
def test_a_matching_serves_as_many_steps_whether_a_cache_skips_them_or_not() -> None:
    """diffusers' cache computes the first and last of four steps, of which the last is too late for its matching."""
    pipes = [build("Flux") for _ in range(2)]
    for pipe, steps in zip(pipes, (1, 2), strict=True):
        tokdyn.wrap(pipe, [TokenMerge(ratio=0.5, reuse_steps=steps)])
        pipe.transformer.enable_cache(diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)))
    every, second = (images(pipe, "Flux") for pipe in pipes)
    assert torch.equal(every, second)


@pytest.mark.parametrize("config", [EVERY, MAG], ids=["first block", "magnitudes"])
def test_a_method_that_skips_other_blocks_goes_with_a_cache_at_the_first_and_last(config: Any) -> None:
    pipe = tokdyn.wrap(build("Flux"), [DepthSkip(blocks=(1, 2))])
    skipped = images(pipe, "Flux")
    pipe.transformer.enable_cache(config)
    assert not torch.equal(images(pipe, "Flux"), skipped)


@pytest.mark.parametrize("method", [DepthSkip(blocks=(1,)), DynamicWidth(target=0.5)], ids=["skip", "width"])
def test_the_results_of_attention_may_be_kept_for_all_tokens(method: Any) -> None:
    pipe = tokdyn.wrap(build("Flux"), [method])
    without = images(pipe, "Flux")
    pipe.transformer.enable_cache(TAYLOR)
    assert not torch.equal(images(pipe, "Flux"), without)


def test_a_cache_that_records_in_every_block_goes_with_skipping_the_last() -> None:
    pipe = tokdyn.wrap(build("Flux"), [DepthSkip(blocks=(-1,))])
    pipe.transformer.enable_cache(TAYLOR)
    assert images(pipe, "Flux").isfinite().all()
