"""What is remembered from step to step belongs to one image: other images take nothing over, sample by sample."""

import pickle
from dataclasses import replace

import pytest
import torch

import tokdyn
from tests.contract.kit import count_from_now, elements_in_memory
from tests.contract.models import TINY, sample, works
from tokdyn import Chunking, DepthSkip, FeatureCache, TokenMerge
from tokdyn.adapters import ADAPTERS, adapter_for
from tokdyn.models import base
from tokdyn.trace import trajectory

CACHES = {
    "steps": FeatureCache(steps=(0, 9)),
    "input": FeatureCache(threshold=1e9),
    "first block": FeatureCache(threshold=1e9, indicator="first_block"),
    "forecast": FeatureCache(threshold=1e9, forecast=2, residual_dtype="float8_e4m3fn"),
}
caches = pytest.mark.parametrize("method", CACHES.values(), ids=list(CACHES))
models = pytest.mark.parametrize(
    "name", ["DiT", "DiTTransformer2DModel", "FluxTransformer2DModel", "Lumina2Transformer2DModel"]
)


def latents_name(name):
    return next(iter(TINY[name].inputs(1)))


def called(model, name, x, level, **changes):
    tiny = TINY[name]
    inputs = {**tiny.inputs(len(x)), **tiny.at(len(x), level), latents_name(name): x, **changes}
    return sample(model(**inputs))


def other(x, seed=7):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@models
@caches
@torch.no_grad()
def test_a_cancelled_trajectory_leaves_nothing_for_the_next_image(name, method):
    model, x = tokdyn.wrap(TINY[name].build(), [method]), TINY[name].inputs(2)[latents_name(name)]
    with tokdyn.disabled(model):
        plain = called(model, name, other(x), 0.6)
    called(model, name, x, 1.0)
    called(model, name, 0.95 * x, 0.9)
    assert tokdyn.stats(model).calls[-1].reused == 2
    assert torch.equal(called(model, name, other(x), 0.6), plain)
    (call,) = tokdyn.stats(model).calls  # of the new image alone
    assert (call.step, call.reused) == (0, 0)


@models
@caches
@torch.no_grad()
def test_one_sample_of_a_batch_begins_another_image(name, method):
    model, x = tokdyn.wrap(TINY[name].build(), [method]), TINY[name].inputs(2)[latents_name(name)]
    called(model, name, x, 1.0)
    mixed = torch.stack([0.95 * x[0], other(x)[1]])
    with tokdyn.disabled(model):
        plain = called(model, name, mixed, 0.9)
    out = called(model, name, mixed, 0.9)
    assert tokdyn.stats(model).calls[-1].reused == 1
    torch.testing.assert_close(out[1], plain[1], rtol=0, atol=2e-6)
    assert not torch.allclose(out[0], plain[0], rtol=0, atol=1e-6)


@caches
@torch.no_grad()
def test_another_prompt_on_the_same_latents_is_computed(method):
    """The run is cancelled after a step and begun again with the same seed and another class, at the same level."""
    model, x = tokdyn.wrap(TINY["DiT"].build(), [method]), TINY["DiT"].inputs(2)["hidden_states"]
    labels = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    with tokdyn.disabled(model):
        plain = called(model, "DiT", 0.95 * x, 0.5, class_labels=labels[1])
    called(model, "DiT", x, 0.6, class_labels=labels[0])
    called(model, "DiT", 0.95 * x, 0.5, class_labels=labels[0])
    assert tokdyn.stats(model).calls[-1].reused == 2
    assert torch.equal(called(model, "DiT", 0.95 * x, 0.5, class_labels=labels[1]), plain)


@torch.no_grad()
def test_budgets_of_branches_follow_the_step_and_not_its_rounded_level():
    name = "FluxTransformer2DModel"
    model, x = tokdyn.wrap(TINY[name].build(), [Chunking(target=2)]), TINY[name].inputs(1)["hidden_states"]
    text = TINY[name].inputs(1)["encoder_hidden_states"]
    tokdyn.set_tail_drop(model, {"cond": 0.0, "uncond": 0.5})
    for step in range(3):
        called(model, name, (1 - 0.003 * step) * x, 0.9)
    assert len({call.kept for call in tokdyn.stats(model).calls}) == 1
    tokdyn.reset(model)
    for step in range(2):
        called(model, name, (1 - 0.003 * step) * x, 0.9)
        called(model, name, (1 - 0.003 * step) * x, 0.9, encoder_hidden_states=text + 1)
    run = tokdyn.stats(model)
    assert [(call.step, call.branch) for call in run.calls] == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    kept = [call.kept[0] for call in run.calls]
    assert kept[0] == kept[2] > kept[1] == kept[3]


@pytest.mark.parametrize(
    ("method", "transfers"),
    [
        (FeatureCache(steps=(0, 9)), 1),
        (FeatureCache(threshold=1e9), 2),  # whether its accumulated change is small
        (TokenMerge(ratio=((0.0, 0.2), (1.0, 0.6))), 1),
        (TokenMerge(ratio=0.5), 0),
    ],
    ids=["steps", "threshold", "levels", "nothing"],
)
@torch.no_grad()
def test_the_host_waits_once_for_what_is_seen_of_a_call(method, transfers, monkeypatch):
    """The comparisons of accelerators, on the CPU: level, latents and conditioning are read together."""
    monkeypatch.setattr(trajectory, "reads_freely", lambda _: False)
    monkeypatch.setattr(base, "synchronises", lambda _: True)  # so timesteps are not looked at
    model, x = tokdyn.wrap(TINY["DiT"].build(), [method]), TINY["DiT"].inputs(2)["hidden_states"]
    called(model, "DiT", x, 0.9)
    counted = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, read=read: counted.append(1) or read(self))
    inputs = {**TINY["DiT"].inputs(2), **TINY["DiT"].at(2, 0.8), "hidden_states": 0.95 * x}
    model(**inputs)
    assert len(counted) == transfers


@caches
@torch.no_grad()
def test_calls_at_one_level_do_not_make_the_memory_grow(method):
    count_from_now()
    model, x = tokdyn.wrap(TINY["DiT"].build(), [method]), TINY["DiT"].inputs(1)["hidden_states"]
    held = []
    for _ in range(2):
        for _ in range(15):
            called(model, "DiT", x, 0.5)
        held.append(elements_in_memory())
    assert held[1] - held[0] < 15 * x.numel() / 4  # statistics of each call; a cache remembers more than its input
    model._reset_stateful_cache()  # as pipelines do when they have made their images
    assert held[1] - elements_in_memory() >= x.numel()
    assert len(pickle.dumps(model.tokdyn)) < 2 * len(pickle.dumps(tokdyn.wrap(TINY["DiT"].build(), [method]).tokdyn))


@caches
@torch.no_grad()
def test_prompts_that_change_from_step_to_step_do_not_make_the_memory_grow(method):
    count_from_now()
    model, x = tokdyn.wrap(TINY["DiT"].build(), [method]), TINY["DiT"].inputs(1)["hidden_states"]
    held = []
    for step in range(10):
        called(model, "DiT", 0.99**step * x, 0.9 - 0.05 * step, class_labels=torch.tensor([step]))
        if step in (5, 9):
            held.append(elements_in_memory())
    assert {call.step for call in tokdyn.stats(model).calls} == set(range(10))  # all of one image
    assert held[1] - held[0] < 4 * x.numel() / 4


def reads_nothing(name, method):
    """Whether a method has no use for the grid: a cache separates text that lies in the sequence of the first block."""
    adapter = next(adapter for adapter in ADAPTERS if name in adapter.classes)
    return isinstance(method, DepthSkip) or adapter.blocks[0].image == "all"


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in sorted(TINY)
        for method in (FeatureCache(threshold=0.1), DepthSkip(blocks=(1,)))
        if works(name, [method]) and reads_nothing(name, method)
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
@torch.no_grad()
def test_methods_that_need_no_grid_read_none(name, method, monkeypatch):
    def refuse(*_):
        raise AssertionError("the grid was read")

    model = TINY[name].build()
    adapter = adapter_for(model)
    refusing = replace(adapter, name="refusing", grid=adapter.grid and refuse)
    monkeypatch.setattr("tokdyn.adapters.registry.REGISTERED", [refusing])
    sample(tokdyn.wrap(model, [method])(**TINY[name].inputs(2)))
    assert len(tokdyn.traces(model)) == 1
