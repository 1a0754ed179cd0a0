"""Sampling with methods attached: reported tokens and FLOPs against those that were counted."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokdyn
from tests.sampling import FACTS, QUICK, tiny
from tokdyn import Chunking, DepthSkip, DiT, DynamicWidth, FeatureCache, TokenMerge
from tokdyn.cost import model_parts
from tokdyn.cost.blocks import PARTS
from tokdyn.cost.counter import operator_formulas
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.sample import SampleConfig, sample
from tokdyn.sample.costs import step_costs
from tokdyn.train.snapshot import save_model

NOISE = Objective(kind="noise")
STACKS = {
    "merge": [TokenMerge(ratio=0.5)],
    "skip": [DepthSkip(blocks=(1,))],
    "chunk": [Chunking(target=4, tail_drop=0.2)],
    "cache": [FeatureCache(steps=(0, 2))],
    "compared": [FeatureCache(threshold=0.1)],
    "width": [DynamicWidth()],
    "cache, chunk and merge": [FeatureCache(steps=(0, 2)), Chunking(target=4), TokenMerge(ratio=0.5)],
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_reported_flops_are_those_counted(name, guidance):
    model = tiny(0, DiT, depth=3, sample_size=8)
    torch.manual_seed(1)
    model = tokdyn.wrap(model, STACKS[name])
    if name == "chunk" and guidance > 1:
        tokdyn.set_tail_drop(model, {"cond": 0.2, "uncond": 0.6})
    sampler = Sampler(steps=4, scheduler="ddim", guidance=guidance, guidance_interval=(0.3, 1.0), clip=True)
    with FlopCounterMode(display=False, custom_mapping=operator_formulas()) as counter:
        made = generate(model, sampler, NOISE, [0, 1, 2], range(3))
    costs = step_costs(model, made.steps, 3)
    assert 3e9 * sum(cost.gflops for cost in costs) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_cached_step_of_dc_dit_skips_its_chunking():
    model = tiny(0, depth=3, sample_size=8)
    tokdyn.wrap(model, [FeatureCache(steps=(0, 2)), DepthSkip(blocks=(1,))])
    made = generate(model, Sampler(steps=4, scheduler="ddim", guidance=2.0), NOISE, [0, 1, 2], range(3))
    costs = step_costs(model, made.steps, 3)
    for step, cost in enumerate(costs):
        counts = made.steps[step].counts
        parts = [model_parts(model, branch.tolist()) for branch in (counts.cond, counts.uncond)]
        total = dict.fromkeys(parts[0], 0.0)
        for name in total:  # of three blocks one is skipped
            total[name] = sum(part[name] for part in parts) * (2 / 3 if name in PARTS else 1)
        computed = total if step in (0, 2) else {name: total[name] for name in ("embed", "encoder", "decoder", "head")}
        assert cost.gflops * 3e9 == pytest.approx(sum(computed.values()), rel=1e-6)


def test_a_job_with_methods_records_its_costs(tmp_path):
    model = tiny(0, DiT, depth=2)
    save_model(model, tmp_path / "saved", FACTS)
    tokdyn.save(tokdyn.wrap(model, [FeatureCache(steps=(0,)), Chunking(target=4)]), tmp_path / "methods")
    settings = {"model": str(tmp_path / "saved"), "count": 5, "batch_size": 2, **QUICK}
    plain = sample(SampleConfig(out=tmp_path / "plain", **settings)).budgets[0]
    budget = sample(SampleConfig(out=tmp_path / "out", methods=tmp_path / "methods", **settings)).budgets[0]
    assert plain.kept is None
    assert 0 < budget.kept < 1
    first, cached, _ = budget.steps
    assert cached.kept is None
    assert cached.gflops < 0.5 * first.gflops
    assert 0 < budget.tflops_per_image < plain.tflops_per_image


def test_flops_are_unknown_if_there_are_more_steps_than_statistics():
    model = tokdyn.wrap(tiny(0, DiT, depth=1, sample_size=2), [FeatureCache(steps=(0,))])
    made = generate(model, Sampler(steps=600, scheduler="ddim"), NOISE, [0], [0])
    costs = step_costs(model, made.steps, 1)
    assert [cost.gflops for cost in costs] == [None] * 600
