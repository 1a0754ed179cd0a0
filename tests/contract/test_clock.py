"""The direction of time: known, said, or assumed and held against the first calls in sampling."""

import copy

import pytest
import torch
from torch import nn

import tokdyn
from tests.contract.foreign import INFERRED, undeclared
from tests.contract.models import TINY, sample, sit
from tokdyn import CheckpointError, DepthSkip, FeatureCache, InputError
from tokdyn.adapters import adapter_for
from tokdyn.calibration.after_training import rewrap

STEPS = [0.95, 0.7, 0.45, 0.2]  # noise levels of a sampler


def wrapped(methods, **more):
    return tokdyn.wrap(sit(), methods, **more)


def time_of(level, noise_at_one):
    return torch.full((2,), level if noise_at_one else 1.0 - level)


@torch.no_grad()
def path(model, noise_at_one, steps=STEPS):
    inputs = TINY["DiT"].inputs(2)
    noise, image = inputs["hidden_states"], torch.ones_like(inputs["hidden_states"])
    for level in steps:
        x = level * noise + (1 - level) * image
        model(**{**inputs, "hidden_states": x, "timestep": time_of(level, noise_at_one)})


def trajectory(model, noise_at_one, steps=STEPS):
    path(model, noise_at_one, steps)
    return tokdyn.stats(model)


@pytest.mark.parametrize("noise_at_one", [False, True])
def test_a_level_that_is_said_is_right_whichever_way_time_runs(noise_at_one):
    level = (1.0, 0.0) if noise_at_one else (0.0, 1.0)
    found = trajectory(wrapped([DepthSkip(blocks=(1,), levels=(0.5, 1.0))], level=level), noise_at_one)
    assert [call.level for call in found.calls] == pytest.approx(STEPS)
    assert [1 in call.blocks for call in found.calls] == [False, False, True, True]
    found = trajectory(wrapped([FeatureCache(threshold=1e9)], level=level), noise_at_one)
    assert [call.step for call in found.calls] == [0, 1, 2, 3]
    assert [call.reused for call in found.calls] == [0, 2, 2, 2]


@pytest.mark.parametrize("method", [FeatureCache(threshold=1e9), DepthSkip(blocks=(1,), levels=(0.5, 1.0))])
def test_an_assumed_direction_is_an_error_where_a_sampler_contradicts_it(method):
    assert trajectory(wrapped([method]), noise_at_one=False).calls[-1].level == pytest.approx(STEPS[-1])
    model = wrapped([method])
    with pytest.raises(InputError, match=r"SiT.*level="):
        trajectory(model, noise_at_one=True)
    assert tokdyn.unwrap(model) is model


@torch.no_grad()
def test_steps_that_a_loop_tells_are_held_against_it_too():
    """Their inputs are not compared, and what follows from what is known without that."""
    inputs = TINY["DiT"].inputs(2)

    def loop(model, noise_at_one):
        with tokdyn.trajectory(model, steps=len(STEPS)) as here:
            for step, level in enumerate(STEPS):
                here.step = step or None  # as pipelines do: nothing is told of the first step
                model(**{**inputs, "timestep": time_of(level, noise_at_one)})

    with pytest.raises(InputError, match=r"SiT.*level="):
        loop(wrapped([DepthSkip(blocks=(1,))]), True)
    model = wrapped([DepthSkip(blocks=(1,))])
    for _ in range(2):
        loop(model, False)


def test_other_images_at_higher_levels_contradict_nothing():
    model, inputs = wrapped([FeatureCache(threshold=1e9)]), TINY["DiT"].inputs(2)
    with torch.no_grad():
        for seed, level in enumerate((0.2, 0.9, 0.3, 0.95)):
            x = torch.randn(2, *inputs["hidden_states"].shape[1:], generator=torch.Generator().manual_seed(seed))
            model(**{**inputs, "hidden_states": x, "timestep": time_of(level, False)})
            model(**{**inputs, "hidden_states": x, "timestep": time_of(level, False)})  # a second branch
    assert trajectory(model, False).cached == 3


def test_in_training_and_once_settled_nothing_is_held_against_it():
    model = wrapped([DepthSkip(blocks=(1,))])
    trajectory(model, False)
    trajectory(model, False, STEPS[::-1])  # an inversion of the sampler, which is known by now
    model = wrapped([DepthSkip(learned=True)]).train()
    for level in STEPS:
        sample(model(**{**TINY["DiT"].inputs(2), "timestep": time_of(level, True)}))


def test_a_function_says_it_too():
    model = wrapped([DepthSkip(blocks=(1,), levels=(0.5, 1.0))], level=lambda _, call: call["timestep"] ** 1.0)
    assert [call.level for call in trajectory(model, True).calls] == pytest.approx(STEPS)


@pytest.mark.parametrize("level", [(1.0, 1.0), (1.0,), "falling", 3, (1.0, None)])
def test_levels_that_say_nothing_are_refused_in_words(level):
    with pytest.raises(InputError, match="level is"):
        wrapped([DepthSkip(blocks=(1,))], level=level)


class Timeless(nn.Module):
    """A model without an argument that is known to be a timestep."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])

    def forward(self, x, when):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_without_a_timestep_needs_a_function():
    with pytest.raises(InputError, match="Timeless has no argument called"):
        tokdyn.wrap(Timeless(), [DepthSkip(blocks=(1,))], level=(1.0, 0.0))
    model = tokdyn.wrap(
        Timeless().eval(), [DepthSkip(blocks=(1,), levels=(0.5, 1.0))], level=lambda _, call: call["when"]
    )
    with torch.no_grad():
        model(torch.randn(2, 4, 8), torch.tensor([0.2, 0.2]))
    assert tokdyn.stats(model).calls[-1].level == pytest.approx(0.2)


def test_what_was_said_is_saved_and_copied(tmp_path):
    model = wrapped([FeatureCache(threshold=1e9)], level=(1.0, 0.0))
    tokdyn.save(model, tmp_path)
    for again in (tokdyn.load(sit(), tmp_path), copy.deepcopy(model)):
        assert trajectory(again, True).cached == 3


def test_a_function_is_asked_for_again(tmp_path):
    def level(_, call):
        return call["timestep"]

    tokdyn.save(wrapped([FeatureCache(threshold=1e9)], level=level), tmp_path)
    with pytest.raises(CheckpointError, match=r"tokdyn_config\.json.* level="):
        tokdyn.load(sit(), tmp_path)
    assert trajectory(tokdyn.load(sit(), tmp_path, level=level), True).cached == 3
    tokdyn.save(wrapped([FeatureCache(threshold=1e9)], level=(0.0, 1.0)), tmp_path)
    assert trajectory(tokdyn.load(sit(), tmp_path, level=(1.0, 0.0)), True).cached == 3


def test_more_methods_keep_what_was_said():
    model = wrapped([FeatureCache(threshold=1e9)], level=lambda _, call: call["timestep"])
    rewrap(model, [DepthSkip(blocks=(1,))])
    assert trajectory(model, True).cached == 3


@pytest.mark.parametrize("level", [(1.0, 0.0), lambda _, call: call["timestep"]])
def test_calibration_takes_it_too(level):
    """With a level the calls of a model whose time runs the other way are those of one trajectory."""
    model = sit()
    with tokdyn.recording(model) as calls, torch.no_grad():
        path(model, noise_at_one=True)
    found = tokdyn.calibrate(model, calls, DepthSkip(), flops=0.8, levels=(0.5,), level=level)
    assert [row[:2] for row in found.table] == [(0.0, 0.5), (0.5, 1.0)]
    skipped = [set(blocks) for _, _, blocks in found.table]
    steps = trajectory(tokdyn.wrap(model, [found], level=level), True).calls
    assert [set(range(4)) - set(call.blocks) for call in steps] == [skipped[1]] * 2 + [skipped[0]] * 2
    tokdyn.unwrap(model)
    cache = tokdyn.calibrate(model, calls, FeatureCache(), steps=0.6, degree=1, level=level)
    assert cache.fingerprint.endswith(":4@0.950-0.450-0.200")
    with pytest.raises(InputError, match="level="):
        tokdyn.calibrate(model, calls, FeatureCache(), steps=0.6, degree=1)


def test_inferred_models_assume_and_declared_ones_know(monkeypatch):
    undeclared(monkeypatch)
    assert all(adapter_for(foreign.tiny.build()).clock == "assumed" for foreign in list(INFERRED.values())[:2])
    assert all(adapter_for(TINY[name].build()).clock == "known" for name in ("DiT", "FluxTransformer2DModel"))
