"""`tokdyn.compare`: pictures of a pipeline without and with methods, from the same noise."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tokdyn
from tests.contract.pipelines import PIPES, build, images
from tests.contract.widths import blocks_of
from tokdyn import FeatureCache, InputError, TokenMerge
from tokdyn.bench.fidelity import psnr

CACHED = [FeatureCache(steps=(0, 2)), TokenMerge(ratio=0.5)]
CALLS = {name: pipe.arguments() for name, pipe in PIPES.items()}


def planes(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["DiT", "SD3", "Wan"])
def test_pictures_are_those_of_the_pipeline_alone(name):
    pipe = build(name)
    compared = tokdyn.compare(pipe, CACHED, [CALLS[name], CALLS[name]], seed=3, num_inference_steps=4)
    assert not tokdyn.pipelines.is_wrapped(pipe)
    plain = images(pipe, name)
    acting = images(tokdyn.wrap(pipe, CACHED), name)
    first, second = compared.pairs
    assert (first.seed, second.seed) == (3, 4)
    for found, expected in ((first.without, plain), (first.acting, acting)):
        expected = expected.numpy().reshape(-1, *expected.shape[-3:])
        assert np.array_equal(found, (expected * 255).round().astype(np.uint8))
    assert first.psnr == pytest.approx(psnr(planes(first.acting), planes(first.without)).mean().item())
    assert np.isfinite(first.psnr)
    assert not np.array_equal(first.without, second.without)
    assert (first.ssim is None) == (min(first.without.shape[1:3]) < 11)
    assert [call.reused for call in compared.stats.calls] == [call.reused for call in tokdyn.stats(pipe).calls]


def test_times_are_those_of_whole_calls():
    pipe = build("Flux")
    for block in blocks_of(pipe.transformer):
        block.register_forward_hook(lambda *_: time.sleep(0.005))
    compared = tokdyn.compare(pipe, [FeatureCache(steps=(0,))], [CALLS["Flux"]] * 3, num_inference_steps=4)
    depth = len(blocks_of(pipe.transformer))
    for pair in compared.pairs:
        assert pair.seconds[0] >= 2 * 4 * depth * 0.005  # two branches of guidance
        assert pair.seconds[1] < pair.seconds[0]
    assert compared.speedup > 1.2
    for pair in compared.pairs:
        assert all(f"{1e3 * seconds:,.1f}" in str(compared) for seconds in pair.seconds)
    assert compared.stats.cached > 0


def test_flops_are_those_of_all_prompts():
    """Sizes differ, so that FLOPs do: merging saves more of those of the larger picture."""
    sizes = [{"height": 32, "width": 32}, {"height": 16, "width": 16}]
    pipe = build("Flux")
    calls = [{**CALLS["Flux"], **size} for size in sizes]
    compared = tokdyn.compare(pipe, [TokenMerge(ratio=0.5)], calls, num_inference_steps=2)
    spent, dense = 0, 0
    tokdyn.wrap(pipe, [TokenMerge(ratio=0.5)])
    for call in calls:
        pipe(**{**call, "num_inference_steps": 2})
        found = tokdyn.stats(pipe)
        spent, dense = spent + found.flops, dense + found.dense_flops
    assert compared.flops_share == pytest.approx(spent / dense)
    assert abs(compared.flops_share - compared.stats.share) > 0.01
    assert f"{spent / dense:.1%}" in str(compared)


def test_equal_pictures_are_equal_and_a_wrapped_pipeline_stays_wrapped(tmp_path):
    pipe = tokdyn.wrap(build("DiT"), [FeatureCache(threshold=-1.0)])
    compared = tokdyn.compare(pipe, prompts=[1, 2], num_inference_steps=3)
    assert tokdyn.pipelines.is_wrapped(pipe)
    assert compared.psnr == float("inf")
    found = json.loads(json.dumps(compared.as_dict()))
    assert found["psnr"] is None
    assert [pair["seed"] for pair in found["pairs"]] == [0, 1]
    with Image.open(compared.save(tmp_path / "deep" / "pairs.png")) as image:
        assert image.width > 2 * 8
        assert image.height > 2 * 8
    assert "FeatureCache" in str(compared)


def test_pairs_of_different_sizes_are_on_one_page_with_words_that_can_be_read(tmp_path):
    """Edits have the sizes of their images."""
    sizes = [{"height": 8, "width": 16}, {"height": 16, "width": 8}]
    prompts = [{**CALLS["SD3"], **size, "prompt": None} for size in sizes]
    compared = tokdyn.compare(build("SD3"), CACHED, prompts, num_inference_steps=2)
    assert [pair.without.shape[1:3] for pair in compared.pairs] == [(8, 16), (16, 8)]
    page = compared.picture()
    assert page.shape[1] > 2 * 200
    assert page.shape[0] > 2 * 200
    with Image.open(compared.save(tmp_path / "pairs.png")) as image:
        assert image.size == page.shape[1::-1]
    many = replace(compared, pairs=compared.pairs * 40)
    pages = list(many.pages())
    assert sum(page.shape[0] for page in pages) > many.picture().shape[0] > 16_384  # every pair is on one of them
    assert len(pages) == 10
    with Image.open(many.save(tmp_path / "many.png")) as image:
        assert image.height == 16_384


@pytest.mark.parametrize(
    ("methods", "prompts", "more", "match"),
    [
        (CACHED, [], {}, "no prompts"),
        (None, [1], {}, "not wrapped"),
        (CACHED, [1], {"generator": None}, "seed="),
        (CACHED, [1], {"output_type": "pil"}, "output_type"),
        (CACHED, [{"class_labels": [1], "generator": None}], {}, "seed="),
    ],
)
def test_bad_input_is_refused_in_words(methods, prompts, more, match):
    pipe = build("DiT")
    with pytest.raises(InputError, match=match):
        tokdyn.compare(pipe, methods, prompts, **more)
    assert not tokdyn.pipelines.is_wrapped(pipe)


def test_what_cannot_be_compared_is_refused_and_an_error_leaves_the_pipeline_alone():
    pipe = build("DiT")
    with pytest.raises(InputError, match="not a pipeline"):
        tokdyn.compare(pipe.transformer, CACHED, [1])
    with pytest.raises(InputError, match="wrapped already"):
        tokdyn.compare(tokdyn.wrap(build("DiT"), CACHED), CACHED, [1])
    with pytest.raises(InputError, match="no_such_argument"):
        tokdyn.compare(pipe, CACHED, [1], no_such_argument=3)
    assert not tokdyn.pipelines.is_wrapped(pipe)
