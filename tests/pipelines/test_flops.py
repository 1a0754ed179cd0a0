"""FLOPs of a whole call of a pipeline, by component; a multiply-add is 2."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokdyn
from tests.contract.pipelines import PIPES, build, images
from tokdyn import DepthSkip, FeatureCache, TokenMerge
from tokdyn.cost.counter import operator_formulas

METHODS = [FeatureCache(steps=(0, 2)), TokenMerge(ratio=0.5)]


def call(name, steps=3):
    generator = torch.Generator().manual_seed(0)
    return {**PIPES[name].arguments(), "num_inference_steps": steps, "output_type": "np", "generator": generator}


@pytest.mark.parametrize("name", ["DiT", "Flux", "Wan"])
def test_components_add_up_to_what_torch_counts(name):
    pipe = build(name)
    mode = FlopCounterMode(display=False, custom_mapping=operator_formulas())
    with mode:
        pipe(**call(name))
    found = tokdyn.flops(pipe, **call(name))
    assert found.total == found.counted == mode.get_total_flops()
    assert set(found.parts) == {"transformer", "vae"}
    twice = tokdyn.flops(pipe, **call(name, 6))
    assert twice.parts["transformer"] == 2 * found.parts["transformer"]
    assert twice.parts["vae"] == found.parts["vae"]
    assert found.dense is None
    assert found.batch == {"DiT": 2}.get(name, 1)


@pytest.mark.parametrize("name", ["DiT", "Flux", "Wan"])
def test_methods_save_flops_of_the_denoiser_alone_and_nothing_is_changed(name):
    pipe = build(name)
    plain = tokdyn.flops(pipe, **call(name))
    tokdyn.wrap(pipe, METHODS)
    expected = images(pipe, name)
    before = tokdyn.stats(pipe)
    found = tokdyn.flops(pipe, **call(name))
    assert found.dense == plain.total
    assert found.parts["transformer"] < plain.parts["transformer"]
    assert found.parts["vae"] == plain.parts["vae"]
    assert tokdyn.stats(pipe) == before
    assert torch.equal(images(pipe, name), expected)


def test_the_random_state_is_left_as_it_was():
    pipe = tokdyn.wrap(build("DiT"), [DepthSkip(blocks=(1,))])
    torch.manual_seed(0)
    tokdyn.flops(pipe, class_labels=[1], num_inference_steps=2)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
