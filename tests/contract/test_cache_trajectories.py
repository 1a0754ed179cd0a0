"""What holds for every rule of FeatureCache: trajectories that end early, Heun, copies, other methods, DC-DiT."""

import copy

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, sample
from tests.contract.references import CALLS as REFERENCES
from tests.contract.test_cache_rules import RATIOS, STEPS, cached, inputs_of, levels, mixed, outputs_of
from tokdyn import FeatureCache
from tokdyn.errors import InputError

RULES = {
    "teacache": FeatureCache(threshold=0.35, max_reused=2),
    "magcache": FeatureCache(rule="magcache", ratios=RATIOS, threshold=0.2, warmup=0.2, max_reused=3),
    "easycache": FeatureCache(rule="easycache", threshold=0.3, warmup=2),
    "seacache": FeatureCache(rule="seacache", threshold=0.2),
    "time": FeatureCache(indicator="time", threshold=0.4),
}
rules = pytest.mark.parametrize("method", RULES.values(), ids=list(RULES))


@rules
@torch.no_grad()
def test_a_cancelled_run_leaves_nothing(method):
    calls = inputs_of("DiT")
    expected = cached("DiT", method, calls)["cond", 0]
    assert mixed(expected)
    model, found = tokdyn.wrap(TINY["DiT"].build(), [method]), []
    with tokdyn.trajectory(model, steps=STEPS):
        for arguments in inputs_of("DiT", seed=9)[:5]:
            model(**arguments)
    with tokdyn.trajectory(model, steps=STEPS):
        for arguments in calls:
            model(**arguments)
            found.append([place in tokdyn.traces(model)[-1].cached for place in range(2)])
    assert list(zip(*found, strict=True)) == expected


@rules
@torch.no_grad()
def test_dc_dit_decides_around_its_own_chunking_by_every_rule(method):
    """Its chunking is inside: what is reused is the effect of encoder, chunking and decoder together."""
    calls, model = inputs_of("DCDiT"), tokdyn.wrap(TINY["DCDiT"].build(), [method])
    plain, found = outputs_of("DCDiT", calls), []
    with tokdyn.trajectory(model, steps=STEPS):
        for arguments, expected in zip(calls, plain, strict=True):
            out, reused = sample(model(**arguments)), tokdyn.traces(model)[-1].cached
            found.append([place in reused for place in range(2)])
            for place in {0, 1} - reused:
                torch.testing.assert_close(out[place], expected[place], rtol=0, atol=2e-6)
    assert mixed([*zip(*found, strict=True)])
    assert found[0] == found[-1] == [False, False]


@pytest.mark.parametrize(
    "methods",
    [
        [tokdyn.Chunking(target=2)],
        [tokdyn.DepthSkip(blocks=(1,)), tokdyn.TokenMerge(ratio=0.3, where="both")],
    ],
    ids=lambda methods: "-".join(type(each).__name__ for each in methods),
)
@rules
@torch.no_grad()
def test_rules_that_see_no_effect_decide_alike_whatever_acts_inside(method, methods):
    """EasyCache compares predictions, which other methods change; its decisions may differ."""
    calls = inputs_of("DiT")
    model = tokdyn.wrap(TINY["DiT"].build(), [method, *methods])
    with tokdyn.trajectory(model, steps=STEPS):
        for arguments in calls:
            model(**arguments)
    reused = [record.reused for record in tokdyn.stats(model).calls]
    alone = [sum(row) for row in zip(*cached("DiT", method, calls)["cond", 0], strict=True)]
    assert reused == alone or (method.rule == "easycache" and any(reused))


@rules
def test_the_two_calls_of_a_step_of_heun_are_decided_apart(method):
    """The predictor and the corrector each have a memory, as two branches have."""
    predicting, correcting = inputs_of("DiT"), inputs_of("DiT", seed=5)
    found = cached("DiT", method, [*zip(predicting, correcting, strict=True)], again=2)
    assert found["cond", 0] == cached("DiT", method, predicting)["cond", 0]
    assert found["cond", 1] == cached("DiT", method, correcting)["cond", 0]


@rules
@torch.no_grad()
def test_a_reused_step_adds_the_last_effect_and_a_computed_one_is_exact(method):
    calls, model = inputs_of("DiT"), tokdyn.wrap(TINY["DiT"].build(), [method])
    plain = outputs_of("DiT", calls)
    with tokdyn.trajectory(model, steps=STEPS):
        for arguments, expected in zip(calls, plain, strict=True):
            out = sample(model(**arguments))
            reused = tokdyn.traces(model)[-1].cached
            for place in range(2):
                alike = torch.allclose(out[place], expected[place], rtol=0, atol=2e-6)
                assert alike != (place in reused)


@rules
@torch.no_grad()
def test_copies_and_saved_models_decide_alike(method, tmp_path):
    calls, model = inputs_of("DiT"), tokdyn.wrap(TINY["DiT"].build(), [method])
    tokdyn.save(model, tmp_path)
    others = [copy.deepcopy(model), tokdyn.load(TINY["DiT"].build(), tmp_path)]
    seen = []
    for each in (model, *others):
        with tokdyn.trajectory(each, steps=STEPS):
            for arguments in calls:
                each(**arguments)
        seen.append([record.reused for record in tokdyn.stats(each).calls])
    assert seen[0] == seen[1] == seen[2]
    assert sum(seen[0]) > 0
    before = outputs_of("DiT", calls[:1])[0]
    assert torch.equal(sample(tokdyn.unwrap(model)(**calls[0])), before)


@torch.no_grad()
def test_inputs_that_a_sampler_changes_in_place_are_compared_as_they_were():
    method, calls = RULES["easycache"], inputs_of("DiT")
    model, found = tokdyn.wrap(TINY["DiT"].build(), [method]), []
    x = calls[0]["hidden_states"].clone()
    with tokdyn.trajectory(model, steps=STEPS):
        for arguments in calls:
            x.copy_(arguments["hidden_states"])
            sample(model(**{**arguments, "hidden_states": x})).zero_()
            found.append([place in tokdyn.traces(model)[-1].cached for place in range(2)])
    assert list(zip(*found, strict=True)) == cached("DiT", method, calls)["cond", 0]


@torch.no_grad()
def test_the_rate_of_a_sample_that_begins_another_image_is_unknown_until_two_steps_are_computed():
    model = tokdyn.wrap(TINY["DiT"].build(), [FeatureCache(rule="easycache", threshold=1e9)])
    x, found = TINY["DiT"].inputs(2)["hidden_states"], []
    for step, level in enumerate(levels(7)):
        if step == 3:
            x = torch.stack([x[0], torch.randn(x[1].shape, generator=torch.Generator().manual_seed(7))])
        x = 0.97 * x
        model(**{**TINY["DiT"].inputs(2), **TINY["DiT"].at(2, level), "hidden_states": x})
        found.append([place in tokdyn.traces(model)[-1].cached for place in range(2)])
    assert [one for one, _ in found] == [False, False, *[True] * 5]
    assert [two for _, two in found] == [False, False, True, False, False, True, True]


@pytest.mark.parametrize(
    "method",
    [
        FeatureCache(warmup=0.2, threshold=9.0),
        FeatureCache(start=0.2, threshold=9.0),
        FeatureCache(end=0.9, threshold=9.0),
        RULES["magcache"],
    ],
    ids=["warmup", "start", "end", "magcache"],
)
@torch.no_grad()
def test_a_share_of_an_unknown_number_of_steps_is_refused_in_words(method):
    model, calls = tokdyn.wrap(TINY["DiT"].build(), [method]), inputs_of("DiT")
    model(**calls[0])  # the first step is computed in any case
    with pytest.raises(InputError, match=r"num_steps=.*tokdyn\.trajectory"):
        model(**calls[1])


@torch.no_grad()
def test_an_edit_is_decided_by_the_generated_image_and_not_by_its_references():
    """Z-Image takes the images of a sample as a list, of several sizes, the generated one last."""
    call = REFERENCES["Z-Image"].inputs(2)
    model = tokdyn.wrap(REFERENCES["Z-Image"].build(), [FeatureCache(rule="easycache", threshold=1e9)])
    with tokdyn.trajectory(model, steps=5):
        for level in (0.9, 0.8, 0.7, 0.6, 0.5):
            images = [[*before, one + level] for *before, one in call["x"]]
            model(**{**call, "x": images, "t": torch.full((2,), 1.0 - level)})
    assert [len(each.cached) for each in tokdyn.traces(model)] == [0, 0, 2, 2, 0]
