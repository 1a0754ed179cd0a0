"""Times in statistics: of every call, of the whole pipeline, and of the same calls without methods."""

import time

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch._dynamo.testing import CompileCounterWithBackend

import tokdyn
from tests.contract.models import TINY, sample
from tests.contract.pipelines import PIPES, build, images
from tests.contract.widths import blocks_of
from tokdyn import DepthSkip, FeatureCache, InputError, TokenMerge
from tokdyn.trace.timing import Stopwatch

CACHED = [FeatureCache(steps=(0, 2))]
every = pytest.mark.parametrize("name", PIPES)
NAP = 0.01


def slow_blocks(model):
    """Let every block take at least 10 ms."""
    for block in blocks_of(model):
        block.register_forward_hook(lambda *_: time.sleep(NAP))
    return len(blocks_of(model))


@every
def test_calls_and_the_whole_are_timed(name):
    pipe = tokdyn.wrap(build(name), [DepthSkip(blocks=(1,))])
    start = time.perf_counter()
    images(pipe, name, 3)
    whole = time.perf_counter() - start
    found = tokdyn.stats(pipe)
    assert all(call.seconds > 0 and call.dense_seconds is None for call in found.calls)
    assert found.seconds == pytest.approx(sum(step.seconds for step in found.steps))
    assert found.seconds < found.pipeline_seconds < whole
    assert found.denoiser_share == pytest.approx(found.seconds / found.pipeline_seconds)
    assert found.speedup is found.pipeline_speedup is None


def test_cached_steps_are_faster_and_dense_calls_beside_them_show_by_how_much():
    pipe = tokdyn.wrap(build("Flux"), CACHED)
    depth = slow_blocks(pipe.transformer)
    with tokdyn.beside_dense(pipe):
        images(pipe, "Flux", 4)
    found = tokdyn.stats(pipe)
    ran = [not call.cached for call in found.calls]
    assert 0 < sum(ran) < len(ran)
    for call in found.calls:
        assert call.dense_seconds >= depth * NAP
        assert call.cached or call.seconds >= depth * NAP
    assert found.seconds >= sum(ran) * depth * NAP
    assert found.speedup == pytest.approx(found.dense_seconds / found.seconds)
    assert found.speedup > 1.1
    without = found.pipeline_seconds - found.dense_seconds
    assert found.pipeline_speedup == pytest.approx((found.pipeline_seconds - found.seconds) / without)
    assert 1 < found.pipeline_speedup < found.speedup
    assert found.as_dict()["speedup"] == found.speedup


@every
@torch.no_grad()
def test_dense_calls_beside_change_nothing(name):
    methods = [FeatureCache(threshold=0.2), TokenMerge(ratio=0.5, seed=1)]
    pipe = tokdyn.wrap(build(name), methods)
    expected, calls = images(pipe, name, 4), tokdyn.stats(pipe).calls
    with tokdyn.beside_dense(pipe):
        assert torch.equal(images(pipe, name, 4), expected)
    beside = tokdyn.stats(pipe).calls
    assert [(call.step, call.branch, call.reused, call.kept) for call in beside] == [
        (call.step, call.branch, call.reused, call.kept) for call in calls
    ]
    images(pipe, name, 2)
    assert tokdyn.stats(pipe).dense_seconds is None


def test_dense_calls_beside_a_cache_of_diffusers_are_refused():
    """They would move its state on."""
    pipe = tokdyn.wrap(build("Flux"), [TokenMerge(ratio=0.5)])
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    with tokdyn.beside_dense(pipe), pytest.raises(InputError, match=r"FirstBlockCacheConfig .*disable_cache"):
        images(pipe, "Flux", 2)
    pipe.transformer.disable_cache()
    with tokdyn.beside_dense(pipe):
        images(pipe, "Flux", 2)
    assert tokdyn.stats(pipe).speedup


def test_a_model_alone_is_timed_in_sampling_and_not_in_training():
    model, inputs = tokdyn.wrap(TINY["DiTTransformer2DModel"].build(), CACHED), TINY["DiTTransformer2DModel"].inputs(2)
    with torch.no_grad():
        sample(model(**inputs))
    (call,) = tokdyn.stats(model).calls
    assert call.seconds > 0
    assert tokdyn.stats(model).pipeline_seconds is None
    both = tokdyn.stats(model, guided=True).calls  # each half of the batch gets its share
    assert [each.seconds for each in both] == [pytest.approx(call.seconds / 2)] * 2
    sample(model.train()(**inputs)).sum().backward()
    (call,) = tokdyn.stats(model).calls
    assert call.seconds is None


def test_the_time_of_a_pipeline_is_not_that_of_a_later_call():
    pipe = tokdyn.wrap(build("DiT"), CACHED)
    images(pipe, "DiT", 2)
    assert tokdyn.stats(pipe).pipeline_seconds > 0
    with torch.no_grad():
        pipe.transformer(torch.randn(1, 4, 8, 8), timestep=torch.tensor([5]), class_labels=torch.tensor([1]))
    assert tokdyn.stats(pipe).pipeline_seconds is None


def test_calls_without_methods_and_calls_that_fail_early_leave_the_statistics():
    pipe = tokdyn.wrap(build("DiT"), CACHED)
    images(pipe, "DiT", 3)
    before = tokdyn.stats(pipe)
    with tokdyn.disabled(pipe):
        images(pipe, "DiT", 1)
    assert tokdyn.stats(pipe) == before
    with pytest.raises(TypeError):
        pipe(class_labels=None)
    assert tokdyn.stats(pipe) == before


@torch.no_grad()
def test_compiled_models_are_timed_outside_of_their_graph():
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("eager")
    model = tokdyn.wrap(TINY["DiTTransformer2DModel"].build(), [DepthSkip(blocks=(1,))])
    run = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        run(**TINY["DiTTransformer2DModel"].inputs(2))
    assert backend.frame_count == 1
    assert all(call.seconds > 0 for call in tokdyn.stats(model).calls)


def test_a_stopwatch_knows_nothing_before_its_end_and_stops_once():
    watch = Stopwatch(torch.device("cpu"))
    assert watch.seconds is None
    time.sleep(0.01)
    watch.stop()
    first = watch.seconds
    assert first >= 0.01
    watch.stop()
    assert watch.seconds == first


@pytest.mark.gpu
def test_events_measure_the_device_and_not_the_queue():
    x = torch.randn(4096, 4096, device="cuda")
    x @ x
    torch.cuda.synchronize()
    watch = Stopwatch(x.device)
    queued = time.perf_counter()
    for _ in range(50):
        x @ x
    queued = time.perf_counter() - queued
    watch.stop()
    assert watch.seconds > queued
