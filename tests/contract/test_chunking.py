"""Learned chunking in models that were built without it: budgets, guidance branches, losses, refusals."""

import pytest
import torch

import tokdyn
from tests.contract.kit import SHARED
from tests.contract.models import TINY, one_of, sample, works
from tokdyn import Chunking, InputError, TokenMerge
from tokdyn.adapters import adapter_for
from tokdyn.ops import ratio_loss, select

MODELS = sorted(name for name in TINY if works(name, [Chunking()]))
every = pytest.mark.parametrize("name", MODELS)


def chunked(name, **settings):
    model = tokdyn.wrap(TINY[name].build(), [Chunking(**{"target": 3, **settings})])
    with torch.no_grad():
        tokdyn.calibrate_router(model, **TINY[name].inputs(4))
    return model


def kept(model):
    return tokdyn.traces(model)[-1].kept


def twice(inputs):
    """The conditional and the unconditional half of a batch: here the same, so that only budgets tell them apart."""
    return {
        name: value if name in SHARED else value + value if isinstance(value, list) else torch.cat([value, value])
        for name, value in inputs.items()
    }


@every
@torch.no_grad()
def test_nothing_dropped_and_nothing_smoothed_is_the_plain_model(name):
    """An untrained residual adds nothing, so training starts from the model as it was."""
    model, inputs = chunked(name, ragged=True, sigma=None), TINY[name].inputs(2)
    ((_, part),) = tokdyn.parts(model)
    part.router.bias.fill_(50.0)
    found = sample(model(**inputs))
    assert set(kept(model)) == {tokdyn.traces(model)[-1].cells}
    torch.testing.assert_close(found, sample(TINY[name].build()(**inputs)), rtol=0, atol=2e-6)


@every
@pytest.mark.parametrize("settings", [{}, {"ragged": True}, {"router": "random"}], ids=["fixed", "ragged", "random"])
@torch.no_grad()
def test_each_sample_has_a_budget_of_its_own(name, settings):
    model, inputs = chunked(name, **settings), TINY[name].inputs(3)
    tokdyn.set_tail_drop(model, torch.tensor([0.0, 0.5, 1.0]))
    together = sample(model(**inputs))
    counts = kept(model)
    assert counts[2] == 1
    for i, drop in enumerate((0.0, 0.5, 1.0)):
        tokdyn.set_tail_drop(model, drop)
        alone = sample(model(**one_of(inputs, i)))
        assert kept(model) == (counts[i],)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)


@every
@torch.no_grad()
def test_guidance_branches_have_budgets(name):
    """Lite-CFG, as halves of a batch or in two calls of a step, whichever the pipelines of the model use."""
    model, single = chunked(name), TINY[name].inputs(2)
    tokdyn.set_tail_drop(model, {"cond": 0.0, "uncond": 0.9})
    how = adapter_for(model).guidance
    if how == "calls":
        for _ in range(2):
            model(**{**single, **TINY[name].at(2, 0.7)})
        named = [call.kept for call in tokdyn.traces(model)[-2:]]
        with model.cache_context("uncond"):
            model(**{**single, **TINY[name].at(2, 0.6)})
        assert kept(model) == named[1]
        full, lean = named
    else:
        model(**twice(single))
        first, second = kept(model)[:2], kept(model)[2:]
        full, lean = (first, second) if how == "cond_first" else (second, first)
        with pytest.raises(InputError, match=r"tail_drop .* 3 samples"):
            model(**TINY[name].inputs(3))
    assert full == (round(tokdyn.traces(model)[-1].cells / 3),) * 2
    assert lean == (full[0] - int(full[0] * 0.9),) * 2


@torch.no_grad()
def test_kept_sets_are_nested_and_follow_the_noise():
    model, tiny = chunked("DiT", tail_drop=((0.0, 0.5), (1.0, 0.0))), TINY["DiT"]
    inputs, seen = tiny.inputs(2), []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for level in (1.0, 0.5, 0.0):
        model(**{**inputs, **tiny.at(2, level)})
    assert seen == [8, 6, 4]
    for drop in (0.0, 0.3, 0.8):
        tokdyn.set_tail_drop(model, drop)
        model(**inputs)
        assert kept(model) == (8 - int(8 * drop + 1e-5),) * 2
    tokdyn.set_tail_drop(model, None)
    model(**{**inputs, **tiny.at(2, 0.0)})
    assert kept(model) == (4, 4)


@every
def test_every_part_learns_and_the_ratio_loss_is_that_of_dc_dit(name):
    model, inputs = chunked(name), TINY[name].inputs(2)
    ((_, part),) = tokdyn.parts(model)
    grids = []
    part.register_forward_hook(lambda *_: None)
    original = part.logits
    part.logits = lambda *args: grids.append(original(*args)) or grids[-1]
    assert tokdyn.losses(model) == {}
    model.train()
    loss = sample(model(**inputs)).square().mean() + sum(tokdyn.losses(model).values())
    del part.logits
    probability, natural = select(torch.sigmoid(grids[0]), False)
    torch.testing.assert_close(tokdyn.losses(model)["Chunking"], 0.03 * ratio_loss(probability, natural, 3.0))
    loss.backward()
    for key, parameter in model.tokdyn.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all()
    assert part.residual.weight.grad.abs().sum() > 0
    assert part.router.bias.grad.abs().sum() > 0
    with torch.no_grad():
        model.eval()(**inputs)
    assert tokdyn.losses(model) == {}


@torch.no_grad()
def test_merging_inside_works_on_any_set_of_tokens():
    model = tokdyn.wrap(TINY["FluxTransformer2DModel"].build(), [Chunking(target=2), TokenMerge(ratio=0.3)])
    model(**TINY["FluxTransformer2DModel"].inputs(2))
    calls = tokdyn.traces(model)[-1].blocks
    assert {call.tokens for call in calls} == {10}
    assert all(count < 10 for call in calls for _, count in call.attention)
    assert all(call.attention for call in calls)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, r"tail_drop .*1\.5"),
        ("much", r"tail_drop .*much"),
        (torch.tensor([0.1, -0.2]), r"tail_drop .*-0\.2"),
        (torch.zeros(2, 2), r"tail_drop .*\(2, 2\)"),
        ({"cond": 0.1}, r"tail_drop .*\['cond'\].*'uncond'"),
    ],
)
def test_wrong_budgets_are_named(value, words):
    model = chunked("DiT")
    with pytest.raises(InputError, match=words):
        tokdyn.set_tail_drop(model, value)


def test_budgets_need_chunking_and_one_value_for_each_sample():
    with pytest.raises(InputError, match=r"tokdyn\.Chunking"):
        tokdyn.set_tail_drop(tokdyn.wrap(TINY["DiT"].build(), [TokenMerge()]), 0.5)
    model = chunked("DiT")
    tokdyn.set_tail_drop(model, torch.tensor([0.0, 0.1, 0.2]))
    with pytest.raises(InputError, match="tail_drop has 3 entries, but the batch holds 2 samples"):
        model(**TINY["DiT"].inputs(2))
    with pytest.raises(InputError, match=r"router.*tokdyn\.Chunking"):
        tokdyn.calibrate_router(tokdyn.wrap(TINY["DiT"].build(), [TokenMerge()]), **TINY["DiT"].inputs(2))


@torch.no_grad()
def test_calibration_asks_for_its_share():
    tiny = TINY["DiT"]
    model = tokdyn.wrap(tiny.build(), [Chunking(target=4, ragged=True)])
    inputs = tiny.inputs(8)
    tokdyn.calibrate_router(model, **inputs)
    assert tokdyn.traces(model) == ()
    model(**inputs)
    assert sum(kept(model)) == 8 * 24 / 4
