"""Sampling DiT and DCDiT, tiny and with random weights."""

from __future__ import annotations

import pytest
import torch

import tokdyn
from tests.sampling import tiny
from tokdyn import DCDiT, DiT, FeatureCache
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import UnsupportedModelError

TINY = {"sample_size": (6, 8), "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Move all weights away from the initial ones, with which every output is zero."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def dc_dit(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomised(DCDiT(**{**TINY, "patch_size": 1, **settings}))


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (Objective(), Sampler(steps=5, guidance=1.5, tail_drop=0.2, uncond_tail_drop=0.9)),
        (Objective(), Sampler(scheduler="dpm", steps=4, tail_drop=0.5)),
        (Objective(kind="flow"), Sampler(steps=4, guidance=2.0, guidance_interval=(0.3, 0.9))),
    ],
)
@pytest.mark.parametrize("router", ["spatial_predictability", "random"])
def test_an_image_of_dc_dit_does_not_depend_on_its_batch(objective, sampler, router):
    model = dc_dit(learn_sigma=objective.learn_sigma, router=router)
    together = generate(model, sampler, objective, [0, 1, 3], [4, 5, 6])
    apart = [generate(model, sampler, objective, [label], [seed]) for label, seed in ((0, 4), (1, 5), (3, 6))]
    # Batches of another size sum in another order, and errors grow by 1 / alpha_T = 160 from the first step.
    torch.testing.assert_close(torch.cat([one.images for one in apart]), together.images, rtol=1e-3, atol=2e-3)
    for step, record in enumerate(together.steps):
        assert torch.equal(record.counts.cond, torch.cat([one.steps[step].counts.cond for one in apart]))
        assert record.counts.tokens == 48


def test_lite_cfg_keeps_fewer_tokens_in_the_unconditional_branch():
    made = generate(dc_dit(), Sampler(steps=4, guidance=1.25, uncond_tail_drop=0.9), Objective(), [0, 1], [0, 1])
    for record in made.steps:
        assert int(record.counts.uncond.sum()) < int(record.counts.cond.sum())
        assert int(record.counts.uncond.min()) >= 1


def test_dit_has_no_counts_and_no_tail_drop():
    torch.manual_seed(0)
    model = randomised(DiT(**{**TINY, "patch_size": 2}))
    made = generate(model, Sampler(steps=4, guidance=2.0), Objective(), [0, 1], [0, 1])
    assert made.images.shape == (2, 3, 6, 8)
    assert [record.counts for record in made.steps] == [None] * 4
    with pytest.raises(UnsupportedModelError, match=r"DiT.*tail_drop"):
        generate(model, Sampler(steps=4, tail_drop=0.5), Objective(), [0], [0])


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_wrapped_model_is_told_its_steps(steps):
    """A latent of so few steps resembles the one before too little to guess that both are of one image."""
    torch.manual_seed(0)
    model = tokdyn.wrap(tiny(0, DiT), [FeatureCache(threshold=float("inf"))])
    for _ in range(2):
        generate(model, Sampler(steps=steps, guidance=2.0), Objective(kind="flow"), [0, 1], [0, 1])
        calls = tokdyn.stats(model).calls
        assert [call.step for call in calls] == list(range(steps))
        assert [call.reused for call in calls] == [0, *[4] * (steps - 2), 0]  # the last step is computed
