"""`tokdyn.trajectory` tells where trajectories begin and end and which step a call is; nothing is guessed then."""

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, sample
from tests.contract.test_trajectories import called, latents_name, other
from tokdyn import Chunking, FeatureCache

MODELS = ["DiT", "FluxTransformer2DModel", "WanTransformer3DModel"]
ALWAYS = FeatureCache(threshold=1e9)  # reuses every step but the first, and the last where that is known
models = pytest.mark.parametrize("name", MODELS)


def latents(name: str, seed: int, batch: int = 2) -> torch.Tensor:
    """Latents that do not resemble those of another seed."""
    return other(TINY[name].inputs(batch)[latents_name(name)], seed)


def reused(model: torch.nn.Module) -> list[int]:
    return [call.reused for call in tokdyn.stats(model).calls]


@models
@torch.no_grad()
def test_told_steps_count_whatever_inputs_and_levels_look_like(name):
    """Levels that round to one number, that rise, and latents that have nothing in common."""
    model = tokdyn.wrap(TINY[name].build(), [FeatureCache(steps=(0, 3))])
    with tokdyn.trajectory(model) as here:
        for step, level in enumerate((0.9, 0.9, 0.5, 0.8, 0.7)):
            here.step = step
            called(model, name, latents(name, step), level)
    assert reused(model) == [0, 2, 2, 0, 2]
    assert [call.step for call in tokdyn.stats(model).calls] == [0, 1, 2, 3, 4]


@models
@pytest.mark.parametrize("num_steps", [None, 50])
@torch.no_grad()
def test_the_last_step_is_computed_where_their_number_is_told(name, num_steps):
    method = FeatureCache(threshold=1e9, num_steps=num_steps)
    model, x = tokdyn.wrap(TINY[name].build(), [method]), latents(name, 0)
    with tokdyn.trajectory(model, steps=4):
        for step in range(4):
            called(model, name, 0.95**step * x, 0.9 - 0.1 * step)
    assert reused(model) == [0, 2, 2, 0]
    for step in range(4):
        called(model, name, 0.95**step * x, 0.9 - 0.1 * step)
    assert reused(model) == [0, 2, 2, 2]


@torch.no_grad()
def test_listed_steps_stay_as_they_are():
    model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(steps=(0, 1))])
    with tokdyn.trajectory(model, steps=4) as here:
        for here.step in range(4):
            called(model, "DiT", latents("DiT", 0), 0.5)
    assert reused(model) == [0, 0, 2, 2]


@models
@pytest.mark.parametrize("broken_off", [False, True], ids=["ended", "an error"])
@torch.no_grad()
def test_nothing_crosses_the_borders(name, broken_off):
    """What was called before the context, in it and after it belongs to other images, though the latents go on."""
    model, x = tokdyn.wrap(TINY[name].build(), [ALWAYS]), latents(name, 0)

    def goes_on(step: int) -> int:
        called(model, name, 0.95**step * x, 0.9 - 0.1 * step)
        return tokdyn.stats(model).calls[-1].reused

    assert [goes_on(0), goes_on(1)] == [0, 2]
    try:
        with tokdyn.trajectory(model) as here:
            here.step = 0
            assert goes_on(2) == 0
            here.step = 1
            assert goes_on(3) == 2
            if broken_off:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [goes_on(4), goes_on(5)] == [0, 2]


@pytest.mark.parametrize("named", [False, True])
@torch.no_grad()
def test_branches_of_a_told_step_have_memories_of_their_own(named):
    """Two prompts a step, with names or without."""
    name = "FluxTransformer2DModel"
    model, x, text = tokdyn.wrap(TINY[name].build(), [ALWAYS]), latents(name, 0), TINY[name].inputs(2)
    prompts = {each: other(text["encoder_hidden_states"], seed) for seed, each in enumerate(("cond", "uncond"))}
    with tokdyn.disabled(model):
        plain = {each: called(model, name, x, 0.9, encoder_hidden_states=prompt) for each, prompt in prompts.items()}
    with tokdyn.trajectory(model) as here:
        for here.step in range(3):
            for each, prompt in prompts.items():
                here.branch = each if named else None
                out = called(model, name, x, 0.9, encoder_hidden_states=prompt)
                torch.testing.assert_close(out, plain[each], rtol=1e-4, atol=1e-5)
    calls = tokdyn.stats(model).calls
    assert [call.step for call in calls] == [0, 0, 1, 1, 2, 2]
    assert [call.branch for call in calls] == ["cond", "uncond"] * 3
    assert [call.reused for call in calls] == [0, 0, 2, 2, 2, 2]


@torch.no_grad()
def test_budgets_follow_told_branches():
    name = "FluxTransformer2DModel"
    model = tokdyn.wrap(TINY[name].build(), [Chunking(target=2)])
    tokdyn.set_tail_drop(model, {"cond": 0.0, "uncond": 0.5})
    kept = {}
    with tokdyn.trajectory(model, steps=2) as here:
        for here.step in range(2):
            for here.branch in ("cond", "uncond"):
                called(model, name, latents(name, 0), 0.9)
                kept.setdefault(here.branch, set()).add(tokdyn.stats(model).calls[-1].kept)
    assert len(kept["cond"]) == len(kept["uncond"]) == 1
    assert sum(*kept["uncond"]) < sum(*kept["cond"])


@torch.no_grad()
def test_another_prompt_or_batch_is_computed_in_a_told_trajectory_too():
    name = "FluxTransformer2DModel"
    model = tokdyn.wrap(TINY[name].build(), [ALWAYS])
    text, found = TINY[name].inputs(2)["encoder_hidden_states"], []
    with tokdyn.trajectory(model) as here:
        for step, (batch, prompt) in enumerate(((2, text), (2, text), (2, other(text)), (1, text[:1]))):
            here.step = step
            inputs = {**TINY[name].inputs(batch), **TINY[name].at(batch, 0.9), "encoder_hidden_states": prompt}
            sample(model(**inputs))
            found.append(tokdyn.stats(model).calls[-1].reused)
    assert found == [0, 2, 0, 0]


@torch.no_grad()
def test_a_call_that_failed_may_be_made_again():
    model, x = tokdyn.wrap(TINY["DiT"].build(), [ALWAYS]), latents("DiT", 0)
    with tokdyn.trajectory(model, steps=3) as here:
        for here.step in range(3):
            if here.step == 1:
                with pytest.raises(Exception, match=r".+"):
                    called(model, "DiT", x[:, :1], 0.9)
            called(model, "DiT", x, 0.9)
    assert reused(model)[-2:] == [0, 0]  # the call after the failed one, and the last of three


def test_what_cannot_be_told_is_refused():
    with pytest.raises(tokdyn.InputError, match="wrap"), tokdyn.trajectory(TINY["DiT"].build()):
        pass
    model = tokdyn.wrap(TINY["DiT"].build(), [ALWAYS])
    for steps in (0, "3", 2.5):
        with pytest.raises(tokdyn.InputError, match=f"steps is {steps!r}"), tokdyn.trajectory(model, steps=steps):
            pass
