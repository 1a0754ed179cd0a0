"""Learned depth gates, and dropping as guidance."""

import pytest
import torch

import tokdyn
from tests.contract.models import TINY, one_of, sample, works
from tests.contract.widths import blocks_of
from tokdyn import DepthSkip, InputError, TokenDrop, TokenMerge
from tokdyn.ops.dropping import drop_guidance

MODELS = sorted(name for name in TINY if works(name, [DepthSkip(learned=True)]))


def gates_of(model):
    """The learned gates of the only method."""
    ((_, gates),) = tokdyn.parts(model)
    return gates


def gated(name, target=0.5, seed=0):
    """A model whose gates open and shut with the noise level."""
    model = tokdyn.wrap(TINY[name].build(), [DepthSkip(learned=True, target=target)])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        score = gates_of(model).score
        score.weight.copy_(torch.randn(score.weight.shape, generator=generator))
        score.bias.zero_()
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_shut_gates_are_not_computed_and_equal_a_table(name):
    model, tiny = gated(name), TINY[name]
    levels = (0.25, 0.75, 0.5)
    clock = {key: torch.cat([tiny.at(1, level)[key] for level in levels]) for key in tiny.at(1, 0.5)}
    together = sample(model(**{**tiny.inputs(3), **clock}))
    ran = sum(call.samples for call in tokdyn.traces(model)[-1].blocks)
    assert 0 < ran < 12
    shut = gates_of(model)(torch.tensor(levels)) <= 0
    assert ran == int((~shut).sum())
    for i, level in enumerate(levels):
        table = tokdyn.wrap(TINY[name].build(), [DepthSkip(blocks=tuple(shut[i].nonzero().flatten().tolist()))])
        alone = sample(table(**{**one_of(tiny.inputs(3), i), **tiny.at(1, level)}))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_gates_learn_from_both_losses(name):
    model, inputs = gated(name).train(), TINY[name].inputs(2)
    score = gates_of(model).score
    sample(model(**inputs)).square().mean().backward()
    from_output = score.bias.grad.clone()
    assert from_output.abs().sum() > 0
    score.bias.grad = None
    torch.manual_seed(3)
    model(**inputs)
    loss = tokdyn.losses(model)["DepthSkip"]
    torch.manual_seed(3)
    uniform = torch.rand(2, score.out_features).clamp(1e-6, 1 - 1e-6)
    drawn = (gates_of(model)(torch.full((2,), 0.5)) + torch.logit(uniform) > 0).float()
    weights = torch.tensor([float(sum(p.numel() for p in block.parameters())) for block in blocks_of(model)])
    share = ((drawn * weights).sum(1) / weights.sum()).mean()
    torch.testing.assert_close(loss, 2 * (share - 0.5) ** 2)
    loss.backward()
    assert score.bias.grad.isfinite().all()


def test_a_budget_is_reached_by_training_on_its_loss_alone():
    model, inputs = (
        tokdyn.wrap(TINY["DiT"].build(), [DepthSkip(learned=True, target=0.5)]).train(),
        TINY["DiT"].inputs(16),
    )
    optimizer = torch.optim.Adam(model.tokdyn.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        model(**inputs)
        tokdyn.losses(model)["DepthSkip"].backward()
        optimizer.step()
    ran = []
    for _ in range(8):
        model(**inputs)
        ran.append(tokdyn.losses(model)["DepthSkip"].item())
    assert sum(ran) / len(ran) < 0.02  # 2 (r - 0.5)^2 with r within 0.1


@pytest.mark.parametrize("name", sorted(name for name in TINY if works(name, [TokenDrop()])))
@torch.no_grad()
def test_dropping_guides_in_sampling_and_repeats_itself(name):
    model, inputs = tokdyn.wrap(TINY[name].build(), [TokenDrop(rate=0.5, blocks=(1, 2))]), TINY[name].inputs(3)
    plain = sample(model(**inputs))
    with tokdyn.dropping(model, 0.3):
        strong = sample(model(**inputs))
    with tokdyn.dropping(model, 0.7):
        weak, again = sample(model(**inputs)), sample(model(**inputs))
        alone = sample(model(**one_of(inputs, 1)))
    assert torch.equal(weak, again)
    torch.testing.assert_close(alone, weak[1:2], rtol=0, atol=2e-6)
    assert not torch.equal(strong, weak)
    assert torch.equal(sample(model(**inputs)), plain)
    torch.testing.assert_close(drop_guidance(strong, weak), weak + 1.5 * (strong - weak))


def test_dropping_needs_token_drop_and_a_share():
    with (
        pytest.raises(InputError, match=r"DiT.*tokdyn\.TokenDrop"),
        tokdyn.dropping(tokdyn.wrap(TINY["DiT"].build(), [TokenMerge()]), 0.3),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"1\.0"),
        tokdyn.dropping(tokdyn.wrap(TINY["DiT"].build(), [TokenDrop()]), 1.0),
    ):
        pass
