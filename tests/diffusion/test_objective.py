"""The training objectives against references written from the papers' equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tokdyn.diffusion.objective import Noised, Objective
from tokdyn.diffusion.schedule import noise_tables
from tokdyn.diffusion.variational import discretised_gaussian_nll
from tokdyn.errors import UnsupportedModelError

SHAPE = (6, 3, 4, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, seed: int = 1) -> torch.Tensor:
    """Draw 8-bit images in [-1, 1], black and white included."""
    levels = torch.randint(0, 256, (count, *SHAPE[1:]), generator=generator(seed))
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    return levels / 127.5 - 1.0


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_betas_agree_with_diffusers(kind):
    ours = Objective(beta_schedule=kind).betas
    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=kind).betas
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-4, atol=1e-7)  # theirs are computed in float32


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2", "scaled_linear"])
@pytest.mark.parametrize("steps", [50, 1000, 4000])
def test_process_of_any_length_ends_in_noise(kind, steps):
    objective = Objective(beta_schedule=kind, num_train_timesteps=steps)
    level = objective.level(torch.arange(steps))
    assert level[0] < 0.2
    assert level[-1] > 0.97
    assert bool((level.diff() > 0).all())


def test_mix_agrees_with_diffusers():
    x0, noise = images(), torch.randn(SHAPE, generator=generator())
    timestep = torch.tensor([0, 1, 10, 500, 998, 999])
    theirs = DDPMScheduler(num_train_timesteps=1000).add_noise(x0, noise, timestep)
    torch.testing.assert_close(Objective().mix(x0, noise, timestep).x_t, theirs, rtol=1e-5, atol=1e-5)


def normal_cdf(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))


def reference_bound(x0: np.ndarray, x_t: np.ndarray, eps: np.ndarray, v: np.ndarray, t: int) -> float:
    """Compute one sample's term of the bound in float64, by equations 4 to 7, 10 to 12 and 15 of arXiv 2102.09672."""
    beta = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - beta)
    before = abar[t - 1] if t > 0 else 1.0
    s = max(t, 1)
    tilde = (1 - abar[s - 1]) / (1 - abar[s]) * beta[s]
    log_variance = (v + 1) / 2 * np.log(beta[t]) + (1 - (v + 1) / 2) * np.log(tilde)
    mean = (x_t - beta[t] / np.sqrt(1 - abar[t]) * eps) / np.sqrt(1 - beta[t])  # eq. 13 of arXiv 2006.11239
    if t == 0:
        bits = []
        for x, m, s in zip(x0.ravel(), mean.ravel(), np.exp(0.5 * log_variance).ravel(), strict=True):
            upper = 1.0 if x > 0.999 else normal_cdf((x + 1 / 255 - m) / s)
            lower = 0.0 if x < -0.999 else normal_cdf((x - 1 / 255 - m) / s)
            bits.append(-math.log2(upper - lower))
        return float(np.mean(bits))
    true_mean = np.sqrt(before) * beta[t] / (1 - abar[t]) * x0
    true_mean = true_mean + np.sqrt(1 - beta[t]) * (1 - before) / (1 - abar[t]) * x_t
    ratio = tilde / np.exp(log_variance)
    divergence = 0.5 * (-np.log(ratio) - 1 + ratio + (true_mean - mean) ** 2 / np.exp(log_variance))
    return float(np.mean(divergence) / math.log(2))


def test_hybrid_loss_equals_the_papers_equations():
    x0, draw = images().double(), generator(2)
    timestep = torch.tensor([0, 1, 2, 40, 500, 999])
    noised = Objective().mix(x0, torch.randn(SHAPE, generator=draw, dtype=torch.float64), timestep)
    eps = noised.noise + 0.1 * torch.randn(SHAPE, generator=draw, dtype=torch.float64)
    v = torch.rand(SHAPE, generator=draw, dtype=torch.float64) * 2 - 1
    loss = Objective().loss(torch.cat([eps, v], dim=1), noised)
    expected = [
        float(((eps[i] - noised.noise[i]) ** 2).mean())
        + reference_bound(x0[i].numpy(), noised.x_t[i].numpy(), eps[i].numpy(), v[i].numpy(), int(t))
        for i, t in enumerate(timestep)
    ]
    # At t = 1 the posterior mean is a difference of numbers near 1 divided by a small variance.
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-8)


def test_single_precision_is_close_to_double():
    x0, draw = images(), generator(3)
    noised = Objective().mix(x0, torch.randn(SHAPE, generator=draw), torch.tensor([0, 1, 2, 40, 500, 999]))
    output = torch.cat([noised.noise, torch.zeros(SHAPE)], dim=1) + 0.05
    exact = Noised(noised.x_t.double(), noised.timestep, noised.noise.double(), x0.double(), noised.level)
    torch.testing.assert_close(
        Objective().loss(output, noised).double(), Objective().loss(output.double(), exact), rtol=2e-3, atol=1e-5
    )


def test_bound_of_a_perfect_model_is_zero_after_the_first_step():
    noised = Objective().mix(images().double(), torch.randn(SHAPE, dtype=torch.float64), torch.full((6,), 300))
    output = torch.cat([noised.noise, torch.full_like(noised.noise, -1.0)], dim=1)  # the true posterior
    assert float(Objective().loss(output, noised).abs().max()) < 1e-12


def test_bound_does_not_train_the_mean():
    noised = Objective().add_noise(images(), generator())
    output = torch.randn(6, 6, 4, 4, generator=generator(5)).requires_grad_()
    Objective().loss(output, noised).sum().backward()
    plain = output.detach()[:, :3].clone().requires_grad_()
    Objective(learn_sigma=False).loss(plain, noised).sum().backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad[:, :3], plain.grad)
    assert bool((output.grad[:, 3:] != 0).any())


def test_bound_is_weighted_by_the_length_of_the_process():
    short, long = Objective(num_train_timesteps=500), Objective(num_train_timesteps=1000)
    for objective in (short, long):
        noised = objective.mix(images().double(), torch.randn(SHAPE, dtype=torch.float64), torch.full((6,), 100))
        output = torch.cat([noised.noise, torch.ones_like(noised.noise)], dim=1)
        beta, abar = objective.betas, torch.cumprod(1 - objective.betas, 0)
        ratio = (1 - abar[99]) / (1 - abar[100])  # the posterior variance over beta
        bits = 0.5 * (-ratio.log() - 1 + ratio) / math.log(2)
        expected = (bits * objective.num_train_timesteps / 1000).expand(6)
        torch.testing.assert_close(objective.loss(output, noised), expected, rtol=1e-6, atol=0)
        assert len(beta) == objective.num_train_timesteps


@given(mean=st.floats(-1.2, 1.2), log_scale=st.floats(-5, 1))
@settings(max_examples=40, deadline=None)
def test_discretised_likelihood_sums_to_one(mean, log_scale):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
    scale = torch.full_like(levels, log_scale)
    nll = discretised_gaussian_nll(levels, torch.full_like(levels, mean), scale)
    assert math.isclose(float(torch.exp(-nll).sum()), 1.0, abs_tol=1e-9)  # 256 probabilities are at least 1e-12


def test_flow_is_a_straight_path_with_constant_velocity():
    objective = Objective(kind="flow")
    x0, noise = images(), torch.randn(SHAPE, generator=generator())
    noised = objective.mix(x0, noise, torch.tensor([0.0, 1.0, 250.0, 500.0, 900.0, 1000.0]))
    torch.testing.assert_close(noised.x_t[0], x0[0])
    torch.testing.assert_close(noised.x_t[3], (x0[3] + noise[3]) / 2)
    torch.testing.assert_close(noised.x_t[5], noise[5])
    torch.testing.assert_close(noised.level, noised.timestep / 1000)
    torch.testing.assert_close(objective.loss(noise - x0, noised), torch.zeros(6))
    torch.testing.assert_close(objective.loss(noise - x0 + 2.0, noised), torch.full((6,), 4.0))


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_prediction_and_clean_image_are_inverses(kind):
    objective = Objective(kind=kind)
    noised = objective.add_noise(images().double(), generator())
    target = noised.noise if kind == "noise" else noised.noise - noised.x0
    x0 = objective.predict_x0(target, noised.x_t, noised.timestep)
    torch.testing.assert_close(x0, noised.x0)
    torch.testing.assert_close(objective.prediction_for(x0, noised.x_t, noised.timestep), target)


@pytest.mark.parametrize(
    ("settings", "lowest", "middle"),
    [({}, 0.0, 499.5), ({"kind": "flow"}, 0.0, 500.0), ({"kind": "flow", "timestep_sampling": "logit_normal"}, 0, 500)],
)
def test_draws_cover_their_range_and_follow_the_generator(settings, lowest, middle):
    objective, x0 = Objective(**settings), torch.zeros(4000, 1, 1, 1)
    first, again = (objective.add_noise(x0, generator(7)) for _ in range(2))
    assert torch.equal(first.timestep, again.timestep)
    assert torch.equal(first.x_t, again.x_t)
    time = first.timestep.double()
    assert lowest <= float(time.min())
    assert float(time.max()) <= 1000
    assert abs(float(time.mean()) - middle) < 20  # four standard errors
    spread = (
        1000 / math.sqrt(12) if settings.get("timestep_sampling") != "logit_normal" else 208.0
    )  # of logit-normal(0, 1)
    assert abs(float(time.std()) - spread) < 12


def test_a_given_generator_leaves_the_global_one_unchanged():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Objective().add_noise(images(), generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        ({"kind": "flow", "learn_sigma": True}, "learn_sigma=false.*kind=noise"),
        ({"timestep_sampling": "logit_normal"}, "timestep_sampling=logit_normal.*kind=flow"),
        ({"schedule": "linear"}, "schedule"),
    ],
)
def test_contradictions_are_refused(settings, values):
    with pytest.raises(ValidationError, match=values):
        Objective(**settings)


def test_wrong_number_of_channels_is_named():
    noised = Objective().add_noise(images(), generator())
    with pytest.raises(UnsupportedModelError, match=r" 3 .* 3.*learn_sigma=True.* 6"):
        Objective().loss(noised.noise, noised)
    with pytest.raises(UnsupportedModelError, match=r" 6 .*learn_sigma=False.* 3"):
        Objective(learn_sigma=False).loss(torch.zeros(6, 6, 4, 4), noised)


def test_training_works_after_sampling_on_the_same_tables():
    objective = Objective(num_train_timesteps=777)  # used by no other test, so its tables are made here
    with torch.inference_mode():
        objective.scales(torch.arange(3))
    noised = objective.add_noise(images(), generator())
    output = torch.zeros(6, 6, 4, 4, requires_grad=True)
    objective.loss(output, noised).sum().backward()
    assert output.grad is not None
    assert bool(torch.isfinite(output.grad).all())


@pytest.mark.parametrize("kind", ["linear", "squaredcos_cap_v2", "scaled_linear"])
def test_the_posterior_is_that_of_two_normal_distributions(kind):
    """q(x_{t-1} | x_t, x_0) is the product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}): precisions add up."""
    tables = noise_tables(kind, 1000, torch.device("cpu"))
    beta, alpha, sigma = (table[1:] for table in (tables.beta, tables.alpha, tables.sigma))
    mean, spread = tables.alpha[:-1], tables.sigma[:-1].square()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    variance = 1 / (1 / spread + (1 - beta) / beta)
    torch.testing.assert_close(tables.log_min[1:], variance.log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tables.posterior_x0[1:], variance * mean / spread, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(tables.posterior_xt[1:], variance * (1 - beta).sqrt() / beta, rtol=1e-6, atol=1e-9)
