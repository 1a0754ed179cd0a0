"""Settings of objectives and samplers, and what is derived from them number by number."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tokdyn.diffusion.guidance import drops, image_shape, null_class, num_classes, takes_tail_drop
from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.randomness import initial_noise, step_generators
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.schedule import betas
from tokdyn.diffusion.schedulers import default_scheduler, open_scheduler
from tokdyn.diffusion.settings import Sampler
from tokdyn.diffusion.variational import discretised_gaussian_nll, gaussian_kl
from tokdyn.errors import RecipeError, UnsupportedModelError

CPU = torch.device("cpu")


def test_a_recipe_that_leaves_a_setting_out_means_its_default():
    assert Sampler().model_dump() == {
        "scheduler": None,
        "steps": 250,
        "guidance": 1.0,
        "guidance_channels": "all",
        "guidance_interval": (0.0, 1.0),
        "tail_drop": 0.0,
        "uncond_tail_drop": None,
        "clip": False,
    }
    noise = {
        "kind": "noise",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "learn_sigma": True,
        "timestep_sampling": "uniform",
    }
    assert Objective().model_dump() == noise
    assert Objective(kind="flow").model_dump() == noise | {"kind": "flow", "learn_sigma": False}


LIMITS = [
    (Sampler, "scheduler", [None, "ddpm", "ddim", "dpm", "euler"], ["heun"]),
    (Sampler, "steps", [1, 100_000], [0, 100_001]),
    (Sampler, "guidance", [0.0, 1.0, 30.0], [-0.1, math.inf, math.nan]),
    (Sampler, "guidance_channels", ["all", "three"], ["four"]),
    (Sampler, "guidance_interval", [(0.0, 1.0), (0.5, 0.5)], [(-0.1, 1.0), (0.0, 1.1), (0.6, 0.5)]),
    (Sampler, "tail_drop", [0.0, 1.0, ((0.0, 0.0), (1.0, 1.0))], [-0.1, 1.1, ((0.0, 1.1),), ((0.0, -0.1),)]),
    (Sampler, "uncond_tail_drop", [None, 0.0, 1.0, ((0.5, 0.5),)], [-0.1, 1.1]),
    (Objective, "num_train_timesteps", [2, 50], [1]),
    (Objective, "kind", ["noise", "flow"], ["velocity"]),
    (Objective, "beta_schedule", ["linear", "squaredcos_cap_v2", "scaled_linear"], ["cosine"]),
]


@pytest.mark.parametrize(("kind", "name", "good", "bad"), LIMITS)
def test_settings_take_the_values_of_their_range_and_no_others(kind, name, good, bad):
    for value in good:
        assert getattr(kind(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError, match=name):
            kind(**{name: value})
    with pytest.raises(ValidationError, match="colour"):
        kind(colour=1)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(kind(), name, good[0])


def test_guidance_acts_within_its_interval_and_at_a_scale_that_is_not_one():
    sampler = Sampler(guidance=2.0, guidance_interval=(0.25, 0.75))
    assert [sampler.guided_at(level) for level in (0.2, 0.25, 0.5, 0.75, 0.8)] == [False, True, True, True, False]
    assert Sampler(guidance=0.0).guided_at(0.5)
    assert not Sampler(guidance=1.0).guided_at(0.5)


@pytest.mark.parametrize("steps", [10, 500, 1000])
def test_betas_are_their_formulas(steps):
    start, end = 1e-4 * 1000 / steps, 0.02 * 1000 / steps
    line = np.linspace(start, end, steps).clip(max=0.999)
    root = (np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2).clip(max=0.999)
    bars = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    cosine = np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bars)])
    for kind, expected in (("linear", line), ("scaled_linear", root), ("squaredcos_cap_v2", cosine)):
        found = betas(kind, steps)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-15)
        assert torch.equal(Objective(beta_schedule=kind, num_train_timesteps=steps).betas, found)


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_signal_and_noise_have_their_shares(kind):
    objective, time = Objective(kind=kind), torch.tensor([0, 1, 500, 999])
    alpha, sigma = objective.scales(time)
    if kind == "flow":
        torch.testing.assert_close(alpha, 1 - time.double() / 1000)
        torch.testing.assert_close(alpha + sigma, torch.ones(4).double())
    else:
        torch.testing.assert_close(alpha, (1 - objective.betas).cumprod(0).sqrt()[time])
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(4).double())
    level = objective.level(time)
    assert level.dtype == torch.float32
    torch.testing.assert_close(level.double(), sigma / (alpha + sigma), rtol=1e-6, atol=1e-7)
    half = objective.mix(torch.ones(4, 1, 2, 2).half(), torch.ones(4, 1, 2, 2).half(), time)
    assert half.x_t.dtype == torch.float16


def test_the_learned_variance_lies_between_its_bounds():
    """-1 is the posterior variance and 1 is beta; between them the logarithm is linear."""
    objective, time = Objective(), torch.tensor([1, 10, 999])
    ends = [objective.log_variance(torch.full((3, 1, 1, 1), v).double(), time).flatten() for v in (-1.0, 0.0, 1.0)]
    bars = (1 - objective.betas).cumprod(0)
    torch.testing.assert_close(ends[2], objective.betas[time].log())
    posterior = objective.betas[time] * (1 - bars[time - 1]) / (1 - bars[time])
    torch.testing.assert_close(ends[0], posterior.log())
    torch.testing.assert_close(ends[1], (ends[0] + ends[2]) / 2)
    first = objective.log_variance(torch.full((2, 1, 1, 1), -1.0).double(), torch.tensor([0, 1])).flatten()
    assert first[0] == first[1]  # the posterior variance of the first step is 0


def test_tables_made_while_sampling_serve_training():
    objective = Objective(num_train_timesteps=37)  # no other test has this length
    with torch.inference_mode():
        objective.scales(torch.tensor([3]))
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    objective.mix(x, torch.zeros_like(x), torch.tensor([3])).x_t.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 - objective.betas).cumprod(0).sqrt()[3].item()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_predictions_are_scored_in_at_least_fp32(dtype):
    output = torch.randn(2, 6, 4, 4).to(dtype)
    prediction, variance = Objective().split(output, 3)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert (prediction.dtype, variance.dtype) == (wanted, wanted)
    assert torch.equal(torch.cat([prediction, variance], 1), output.to(wanted))
    assert Objective(learn_sigma=False).split(output, 6)[1] is None


def test_a_flow_ignores_a_second_half():
    objective = Objective(kind="flow")
    noised = objective.add_noise(torch.randn(2, 3, 4, 4), torch.Generator().manual_seed(0))
    velocity = noised.noise - noised.x0 + 1.0
    wide = torch.cat([velocity, torch.randn(2, 3, 4, 4)], dim=1)
    assert objective.split(wide, 3)[1] is None
    assert torch.equal(objective.loss(wide, noised), objective.loss(velocity, noised))


def test_seeds_mean_the_same_images_in_every_version():
    """Low 32 bits stay, higher ones are folded in by the golden ratio; steps draw from a stream of their own."""
    golden, stream = 0x9E3779B1, 0x9E3779B97F4A7C15
    for seed in (0, 5, 2**32 - 1, 2**32, 3 * 2**32 + 7, 2**61 + 1):
        folded = (seed % 2**32) ^ (seed // 2**32 * golden % 2**32)
        expected = torch.randn(3, 2, generator=torch.Generator().manual_seed(folded))
        (noise,) = initial_noise([seed], (3, 2))
        assert torch.equal(noise, expected)
        (own,) = step_generators([seed], CPU)
        assert own.initial_seed() == (folded + stream) % 2**63


def test_names_of_schedulers_fit_their_objectives():
    assert default_scheduler(Objective()) == "ddpm"
    assert default_scheduler(Objective(kind="flow")) == "euler"


@pytest.mark.parametrize("steps", [2, 7, 50, 1000])
def test_ancestral_steps_are_spread_over_all_timesteps(steps):
    scheduler = open_scheduler("ddpm", steps, Objective())
    expected = [round(999 - i * 999 / (steps - 1)) for i in range(steps)]
    assert np.abs(scheduler.timesteps.numpy() - expected).max() <= 1  # halves may be rounded either way
    assert scheduler.timesteps.tolist()[:1] + scheduler.timesteps.tolist()[-1:] == [999, 0]
    assert scheduler.config.variance_type == "learned_range"
    assert open_scheduler("ddpm", steps, Objective(learn_sigma=False)).config.variance_type == "fixed_small"
    assert not scheduler.config.clip_sample


@pytest.mark.parametrize("name", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 3, 10, 1000])
def test_deterministic_steps_end_one_spacing_above_the_image(name, steps):
    found = open_scheduler(name, steps, Objective()).timesteps.tolist()
    expected = [1000 - i * 1000 / steps - 1 for i in range(steps)]
    assert np.abs(np.array(found) - expected).max() <= 0.5
    assert len(set(found)) == steps


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_deterministic_steps_start_where_the_image_can_be_told(name):
    """The cosine schedule ends in noise without signal; solvers start at half a log signal-to-noise ratio of -5.2."""
    objective = Objective(beta_schedule="squaredcos_cap_v2")
    alpha, sigma = objective.scales(torch.arange(1000))
    usable = int(((alpha / sigma).log() >= -5.2).sum())
    assert 900 < usable < 1000
    assert open_scheduler(name, 10, objective).timesteps[0] == usable - 1
    assert len(open_scheduler(name, usable, objective).timesteps) == usable
    for steps in (0, usable + 1):
        with pytest.raises(RecipeError, match=f"{name} .*1 to {usable} .*{steps}"):
            open_scheduler(name, steps, objective)


def test_solvers_have_their_order():
    assert open_scheduler("ddim", 5, Objective()).config.solver_order == 1
    assert open_scheduler("dpm", 5, Objective()).config.solver_order == 2


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_flow_steps_have_equal_length(steps):
    scheduler = open_scheduler("euler", steps, Objective(kind="flow", num_train_timesteps=500))
    expected = [1 - i / steps for i in range(steps + 1)]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), [500 * s for s in expected[:-1]], rtol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [("euler", "noise"), ("ddpm", "flow"), ("ddim", "flow"), ("dpm", "flow")])
def test_schedulers_of_the_other_objective_are_refused(name, kind):
    with pytest.raises(RecipeError, match=f"{name} .*{kind}"):
        open_scheduler(name, 10, Objective(kind=kind))


@pytest.mark.parametrize("steps", [1, 51])
def test_ancestral_sampling_takes_two_steps_to_all(steps):
    objective = Objective(num_train_timesteps=50)
    assert len(open_scheduler("ddpm", 50, objective).timesteps) == 50
    with pytest.raises(RecipeError, match=f"2 to 50 .*{steps}"):
        open_scheduler("ddpm", steps, objective)


def test_the_divergence_of_two_gaussians_is_its_integral():
    grid = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    for m1, s1, m2, s2 in ((0.0, 0.0, 0.0, 0.0), (0.3, -1.0, -0.5, 0.4), (1.0, 0.7, 1.2, -0.3)):
        one, other = (torch.distributions.Normal(m, math.exp(s / 2)) for m, s in ((m1, s1), (m2, s2)))
        log_ratio = one.log_prob(grid) - other.log_prob(grid)
        expected = torch.trapezoid(one.log_prob(grid).exp() * log_ratio, grid)
        torch.testing.assert_close(
            gaussian_kl(*(torch.tensor(v).double() for v in (m1, s1, m2, s2))), expected, atol=1e-6, rtol=0
        )


def test_a_value_that_cannot_be_has_a_finite_likelihood():
    """The least probability is 1e-12, so that one pixel does not make a loss infinite."""
    zero = torch.zeros(1, dtype=torch.float64)
    nll = discretised_gaussian_nll(zero, zero + 100.0, zero - 5.0)
    assert nll.item() == pytest.approx(-math.log(1e-12))


@pytest.mark.parametrize(
    ("curve", "any_"), [(0.0, False), (0, False), (0.1, True), (((0.0, 0.0),), False), (((0.0, 0.0), (1.0, 0.2)), True)]
)
def test_a_curve_drops_where_any_of_its_values_does(curve, any_):
    assert drops(curve) is any_


def test_models_say_what_they_draw():
    def of(**config):
        return SimpleNamespace(config=config)

    assert image_shape(of(in_channels=4, sample_size=8)) == (4, 8, 8)
    assert image_shape(of(in_channels=3, sample_size=[6, 9])) == (3, 6, 9)
    assert num_classes(of(num_classes=7)) == null_class(of(num_classes=7)) == 7
    assert num_classes(of(num_embeds_ada_norm=1000)) == 1000
    with pytest.raises(UnsupportedModelError, match=r"SimpleNamespace.*num_classes"):
        num_classes(of())


def test_a_tail_drop_is_for_models_whose_forward_takes_one():
    class With(nn.Module):
        def forward(self, x, tail_drop=0.0):
            return x

    assert takes_tail_drop(With())
    assert takes_tail_drop(torch.compile(With(), backend="eager"))
    assert not takes_tail_drop(nn.Linear(1, 1))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5)])
def test_records_tell_each_step(routed, interval):
    sampler = Sampler(steps=4, scheduler="ddim", guidance=2.0, guidance_interval=interval, tail_drop=0.2)
    states = []
    made = generate(routed(), sampler, Objective(), [1, 2, 3], [4, 5, 6], callback=states.append)
    assert [record.index for record in made.steps] == [state.index for state in states] == [0, 1, 2, 3]
    alpha, sigma = Objective().scales(torch.tensor([int(record.timestep) for record in made.steps]))
    assert [record.level for record in made.steps] == pytest.approx((sigma / (alpha + sigma)).tolist())
    for record, state in zip(made.steps, states, strict=True):
        assert state.level == record.level
        assert state.timestep.tolist() == [record.timestep] * 3
        assert record.guided == sampler.guided_at(record.level)
        assert record.counts.cond.shape == (3,)
        assert (record.counts.uncond is not None) == record.guided
        kept = [record.counts.cond] if record.counts.uncond is None else [record.counts.cond, record.counts.uncond]
        assert record.counts.share() == pytest.approx(torch.cat(kept).double().mean().item() / 24)
        assert torch.equal(state.keep().sum(1), record.counts.cond)
    assert {record.guided for record in made.steps} == ({True} if interval[1] == 1.0 else {True, False})


def test_models_without_routing_have_no_counts(oracle):
    states = []
    made = generate(oracle(Objective()), Sampler(steps=3), Objective(), [0], [0], callback=states.append)
    assert [record.counts for record in made.steps] == [None] * 3
    assert [state.keep() for state in states] == [None] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_likelihood_is_as_exact_above_the_mean_as_below(dtype):
    """Both tails are small differences of the distribution function, which is exact near 0 and not near 1."""
    mean = torch.linspace(0.0, 0.6, 61, dtype=dtype)
    x, scale = torch.zeros_like(mean), torch.full_like(mean, math.log(0.1))
    below, above = (discretised_gaussian_nll(x, sign * mean, scale) for sign in (1, -1))
    torch.testing.assert_close(above, below, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32, torch.float64])
def test_noisy_images_are_held_in_at_least_fp32(routed, weights):
    states, wanted = [], torch.float64 if weights == torch.float64 else torch.float32
    made = generate(routed().to(weights), Sampler(steps=3), Objective(), [0], [0], callback=states.append)
    assert {state.x.dtype for state in states} == {state.prediction.dtype for state in states} == {wanted}
    assert made.images.dtype == torch.float32


def test_a_model_that_fails_gets_its_mode_back(routed):
    def fail(*_):
        raise ZeroDivisionError

    model = routed().train()
    model.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        generate(model, Sampler(steps=2), Objective(), [0], [0])
    assert model.training
