"""Sampling: known distributions are reproduced, and settings that must not matter do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from tokdyn.diffusion.objective import Objective
from tokdyn.diffusion.randomness import initial_noise, step_generators
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler
from tokdyn.errors import InputError, RecipeError, UnsupportedModelError

NOISE, PLAIN, FLOW = Objective(), Objective(learn_sigma=False), Objective(kind="flow")
FLOW_MODEL = {"learn_sigma": False}
# Convolutions sum in another order over batches of another size; errors grow over a trajectory.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def abar(objective: Objective = NOISE) -> np.ndarray:
    return np.cumprod(1 - objective.betas.numpy())


@pytest.mark.parametrize(
    ("objective", "scheduler", "steps"),
    [
        (NOISE, "ddim", 1000),
        (NOISE, "dpm", 100),
        (PLAIN, "dpm", 60),
        (FLOW, "euler", 1000),
        (Objective(beta_schedule="squaredcos_cap_v2"), "dpm", 100),
        (Objective(num_train_timesteps=400), "ddim", 400),
    ],
)
def test_deterministic_schedulers_follow_the_exact_flow_of_a_gaussian(oracle, objective, scheduler, steps):
    """For N(mean, std^2) the probability flow is affine: x_0 = mean + std (x_T - alpha_T mean) / std of x_T."""
    mean, std = 0.3, 0.5
    seeds = [5, 6]
    made = generate(oracle(objective, mean, std), Sampler(scheduler=scheduler, steps=steps), objective, [0, 0], seeds)
    first = torch.tensor([made.steps[0].timestep])
    alpha, sigma = (float(scale) for scale in objective.scales(first if objective.kind == "flow" else first.long()))
    noise = initial_noise(seeds, (1, 32, 32))
    exact = mean + std * (noise - alpha * mean) / math.hypot(alpha * std, sigma)
    # The error of discretisation is of first order in 1/1000, or of second order in 1/60 to 1/100.
    torch.testing.assert_close(made.images, exact, rtol=0, atol=0.02)
    assert abs(float(made.images.mean()) - mean) < 4 * std / 45  # 2048 pixels
    assert abs(float(made.images.std()) / std - 1) < 4 / 64


@pytest.mark.parametrize(("spread", "steps"), [(-1.0, 1000), (1.0, 1000), (0.0, 250), (-1.0, 10), (1.0, 10)])
def test_ddpm_has_the_closed_form_mean_and_variance(oracle, spread, steps):
    """Every reverse step of the oracle is affine, so mean and variance of the result follow a recursion."""
    mean, std, bars = 0.3, 0.5, abar()
    timesteps = np.linspace(999, 0, steps).round().astype(int)
    centre, variance = 0.0, 1.0
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        here, before = bars[now], 1.0 if after is None else bars[after]
        beta = 1 - here / before
        gain = np.sqrt(here) * std**2 / (here * std**2 + 1 - here)  # E[x_0 | x_t] = mean + gain (x_t - alpha mean)
        from_x0, from_xt = np.sqrt(before) * beta / (1 - here), np.sqrt(1 - beta) * (1 - before) / (1 - here)
        slope = from_x0 * gain + from_xt
        centre = slope * centre + from_x0 * mean * (1 - gain * np.sqrt(here))
        smallest = (1 - before) / (1 - here) * beta
        extra = 0.0 if after is None else beta ** ((spread + 1) / 2) * smallest ** ((1 - spread) / 2)
        variance = slope**2 * variance + extra
    images = generate(
        oracle(NOISE, mean, std, spread=spread), Sampler(steps=steps), NOISE, [0] * 4, [1, 2, 3, 4]
    ).images
    assert abs(float(images.mean()) - centre) < 4 * math.sqrt(variance / images.numel())
    assert abs(float(images.var()) / variance - 1) < 4 * math.sqrt(2 / images.numel())
    if steps == 1000:
        assert abs(centre - mean) < 1e-2
        assert abs(math.sqrt(variance) / std - 1) < 1e-2


def test_ddpm_without_a_learned_variance_uses_the_posterior_variance(oracle):
    learned = generate(oracle(NOISE, spread=-1.0), Sampler(steps=20), NOISE, [0], [3])
    fixed = generate(oracle(PLAIN), Sampler(steps=20), PLAIN, [0], [3])
    torch.testing.assert_close(learned.images, fixed.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_the_ddim_of_diffusers_where_that_is_exact(routed, steps):
    model = routed(learn_sigma=False)
    theirs = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(steps)
    x = initial_noise([3, 4], (4, 6, 4))
    with torch.inference_mode():
        for timestep in theirs.timesteps:
            x = theirs.step(model(x, timestep.expand(2), torch.tensor([1, 2])).sample, timestep, x).prev_sample
    made = generate(model, Sampler(scheduler="ddim", steps=steps), PLAIN, [1, 2], [3, 4])
    assert [record.timestep for record in made.steps] == theirs.timesteps.tolist()
    torch.testing.assert_close(made.images, x.clone(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("steps", [2, 3, 7, 333, 999, 1000])
def test_every_number_of_steps_gives_as_many_distinct_timesteps(oracle, name, steps):
    made = generate(oracle(NOISE, size=1), Sampler(scheduler=name, steps=steps), NOISE, [0], [0])
    timesteps = [record.timestep for record in made.steps]
    assert len(set(timesteps)) == steps
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999
    assert bool(torch.isfinite(made.images).all())


CASES = [
    (NOISE, True, Sampler(scheduler="ddpm", steps=6)),
    (NOISE, True, Sampler(scheduler="ddim", steps=5, guidance=2.0, tail_drop=0.3)),
    (NOISE, True, Sampler(scheduler="dpm", steps=5, guidance=1.5, uncond_tail_drop=0.9)),
    (FLOW, False, Sampler(steps=4, guidance=3.0, guidance_interval=(0.2, 0.8))),
]


@pytest.mark.parametrize(("objective", "sigma", "sampler"), CASES)
def test_an_image_does_not_depend_on_its_batch(routed, objective, sigma, sampler):
    model, labels, seeds = routed(sigma), [0, 3, 5, 2, 2], [7, 8, 9, 10, 11]
    together = generate(model, sampler, objective, labels, seeds)
    for order in ([4], [1, 0], [3, 4, 2]):
        apart = generate(model, sampler, objective, [labels[i] for i in order], [seeds[i] for i in order])
        torch.testing.assert_close(apart.images, together.images[order], **CLOSE)
        for some, whole in zip(apart.steps, together.steps, strict=True):
            assert torch.equal(some.counts.cond, whole.counts.cond[order])


def test_seeds_decide_the_images_and_the_global_generator_does_not(routed):
    model, sampler = routed(), Sampler(steps=4)
    state = torch.get_rng_state()
    first = generate(model, sampler, NOISE, [1, 1], [1, 2]).images
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(10)
    assert torch.equal(generate(model, sampler, NOISE, torch.tensor([1, 1]), torch.tensor([1, 2])).images, first)
    assert not torch.allclose(first[0], first[1], atol=0.1)


def test_step_noise_is_not_the_initial_noise():
    start = initial_noise([5], (4096,))[0]
    (generator,) = step_generators([5], torch.device("cpu"))
    later = torch.randn(4096, generator=generator)
    assert abs(float(torch.corrcoef(torch.stack([start, later]))[0, 1])) < 4 / 64


def test_large_seeds_have_noise_of_their_own():
    """torch's CPU generator reads 32 bits of a seed, so seeds that differ above them must be folded into them."""
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**61]
    start = initial_noise(seeds, (64,))
    steps = torch.stack([torch.randn(64, generator=own) for own in step_generators(seeds, torch.device("cpu"))])
    assert len({tuple(row.tolist()) for row in torch.cat([start, steps])}) == 2 * len(seeds)


def test_seeds_below_32_bits_are_those_of_torch():
    for seed in (0, 5, 2**32 - 1):
        expected = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(initial_noise([seed], (64,))[0], expected)


def test_guidance_of_one_computes_no_second_branch(oracle):
    model = oracle(NOISE)
    plain = generate(model, Sampler(steps=5), NOISE, [0, 1], [0, 1])
    same = generate(model, Sampler(steps=5, guidance=1.0, uncond_tail_drop=0.9), NOISE, [0, 1], [0, 1])
    assert torch.equal(plain.images, same.images)
    assert set(model.calls) == {2}
    assert not any(record.guided for record in plain.steps)


def test_guidance_near_one_is_near_no_guidance(routed):
    model = routed()
    plain = generate(model, Sampler(steps=5), NOISE, [0, 1], [0, 1]).images
    guided = generate(model, Sampler(steps=5, guidance=1.0 + 1e-7), NOISE, [0, 1], [0, 1]).images
    torch.testing.assert_close(guided, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_extrapolates_from_no_class_to_the_class(oracle, scale):
    """Guiding an oracle whose classes differ in their mean gives the oracle of the extrapolated mean."""
    model = oracle(NOISE, mean=0.2, shift=0.1)  # class 0 is 0.2, class 1 is 0.3, no class (2) is 0.4
    made = generate(model, Sampler(steps=8, guidance=scale, scheduler="ddim"), NOISE, [1], [4]).images
    mean = 0.4 + scale * (0.3 - 0.4)
    exact = generate(oracle(NOISE, mean=mean), Sampler(steps=8, scheduler="ddim"), NOISE, [0], [4]).images
    torch.testing.assert_close(made, exact, rtol=0, atol=1e-5)


def test_three_channels_are_guided_on_request(routed):
    """The step from pure noise is affine in the prediction, so the fourth channel shows that it was not guided."""
    model = routed()
    settings = {"steps": 1, "scheduler": "ddim"}
    plain = generate(model, Sampler(**settings), NOISE, [1], [0]).images
    three = generate(model, Sampler(**settings, guidance=4.0, guidance_channels="three"), NOISE, [1], [0]).images
    everything = generate(model, Sampler(**settings, guidance=4.0), NOISE, [1], [0]).images
    torch.testing.assert_close(three[:, :3], everything[:, :3], **CLOSE)
    torch.testing.assert_close(three[:, 3], plain[:, 3], **CLOSE)
    assert not torch.allclose(everything[:, 3], plain[:, 3], rtol=1e-2)


def test_equal_drops_in_both_branches_are_plain_guidance(routed):
    model = routed()
    plain = generate(model, Sampler(steps=4, guidance=2.0, tail_drop=0.4), NOISE, [1, 2], [0, 1])
    lite = generate(model, Sampler(steps=4, guidance=2.0, tail_drop=0.4, uncond_tail_drop=0.4), NOISE, [1, 2], [0, 1])
    assert torch.equal(plain.images, lite.images)
    assert not any(isinstance(drop, torch.Tensor) for drop in model.drops)


def test_lite_cfg_drops_per_branch_in_one_call(routed):
    model = routed()
    made = generate(model, Sampler(steps=3, guidance=2.0, tail_drop=0.1, uncond_tail_drop=0.9), NOISE, [1, 2], [0, 1])
    assert len(model.drops) == 3
    assert all(drop.tolist() == pytest.approx([0.1, 0.1, 0.9, 0.9]) for drop in model.drops)
    for record in made.steps:
        assert record.counts.uncond.sum() < record.counts.cond.sum()
        assert record.counts.tokens == 24
        both = torch.cat([record.counts.cond, record.counts.uncond])
        assert record.counts.share() == pytest.approx(float(both.double().mean()) / 24)


def test_drops_run_along_their_points_with_the_noise_level(routed):
    """Each step drops the value of the curve at its level, in each branch; a flat curve equals a number."""
    model = routed()
    curve = ((0.2, 0.6), (0.8, 0.0))
    made = generate(model, Sampler(steps=5, guidance=2.0, tail_drop=curve, uncond_tail_drop=0.9), NOISE, [1], [0])
    for record, drop in zip(made.steps, model.drops, strict=True):
        wanted = min(max(0.6 * (0.8 - record.level) / 0.6, 0.0), 0.6)
        assert drop.tolist() == pytest.approx([wanted, 0.9])
    assert len({drop.tolist()[0] for drop in model.drops}) > 2
    flat = generate(model, Sampler(steps=5, tail_drop=((0.0, 0.4), (1.0, 0.4))), NOISE, [1], [0])
    same = generate(model, Sampler(steps=5, tail_drop=0.4), NOISE, [1], [0])
    assert torch.equal(flat.images, same.images)
    with pytest.raises(ValueError, match="tail_drop"):
        Sampler(tail_drop=((0.5, 0.1), (0.5, 0.2)))


def test_outside_the_interval_only_the_conditional_branch_is_computed(oracle):
    model = oracle(NOISE, shift=0.5)
    plain = generate(model, Sampler(steps=10, guidance=2.0), NOISE, [0, 1], [0, 1])
    full = generate(model, Sampler(steps=10, guidance=2.0, guidance_interval=(0, 1)), NOISE, [0, 1], [0, 1])
    assert torch.equal(plain.images, full.images)
    model.calls.clear()
    part = generate(model, Sampler(steps=10, guidance=2.0, guidance_interval=(0.2, 0.6)), NOISE, [0, 1], [0, 1])
    in_interval = [0.2 <= record.level <= 0.6 for record in part.steps]
    assert 0 < sum(in_interval) < 10
    assert model.calls == [4 if guided else 2 for guided in in_interval]
    assert [record.guided for record in part.steps] == in_interval


def test_the_interval_of_guidance_includes_both_ends(oracle):
    """The levels of four Euler steps are 1, 0.75, 0.5 and 0.25, exactly."""
    for interval, guided in (
        ((0, 1), [True] * 4),
        ((0.5, 1), [True, True, True, False]),
        ((0.25, 0.75), [False, True, True, True]),
        ((0.5, 0.5), [False, False, True, False]),
        ((0.3, 0.9), [False, True, True, False]),
    ):
        sampler = Sampler(scheduler="euler", steps=4, guidance=2.0, guidance_interval=interval)
        made = generate(oracle(FLOW), sampler, FLOW, [0], [0])
        assert [record.level for record in made.steps] == [1.0, 0.75, 0.5, 0.25]
        assert [record.guided for record in made.steps] == guided


def test_levels_fall_from_noise_to_image_and_mean_the_same_under_both_objectives(oracle):
    for objective in (NOISE, FLOW):
        levels = [r.level for r in generate(oracle(objective), Sampler(steps=20), objective, [0], [0]).steps]
        assert levels == sorted(levels, reverse=True)
        assert levels[0] > 0.99
    time = torch.tensor([700])
    alpha, sigma = NOISE.scales(time)
    share = float(sigma / (alpha + sigma))
    assert float(NOISE.level(time)) == pytest.approx(share)
    same = torch.tensor([1000 * share])  # the flow time with the same ratio of noise to signal
    assert float(FLOW.level(same)) == pytest.approx(share)
    assert float(FLOW.scales(same)[1] / FLOW.scales(same)[0]) == pytest.approx(float(sigma / alpha))


@pytest.mark.parametrize(("objective", "scheduler"), [(NOISE, "ddpm"), (NOISE, "dpm"), (FLOW, "euler")])
def test_clip_keeps_every_prediction_of_the_image_in_range(oracle, objective, scheduler):
    largest: list[float] = []
    sampler = Sampler(scheduler=scheduler, steps=8, clip=True)
    images = generate(
        oracle(objective, mean=0.9, std=0.5),
        sampler,
        objective,
        [0],
        [0],
        callback=lambda step: largest.append(float(step.x0().abs().max())),
    ).images
    assert max(largest) < 1 + 1e-3  # x_0 is recovered from a prediction, where alpha is as small as 0.006
    assert float(images.abs().max()) < 1 + 1e-3


def test_callback_gets_every_step(routed):
    steps = []
    settings = Sampler(steps=4, guidance=2.0, tail_drop=0.1, uncond_tail_drop=0.9)
    made = generate(routed(), settings, NOISE, [0, 1], [0, 1], callback=steps.append)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[0].x, initial_noise([0, 1], (4, 6, 4)))
    assert steps[0].x0().shape == (2, 4, 6, 4)
    for step, record in zip(steps, made.steps, strict=True):  # the conditional branch comes first
        assert torch.equal(step.keep().sum(1), record.counts.cond)


def test_caches_of_diffusers_are_reset_after_a_trajectory(routed):
    """diffusers' caching hooks add this method to a model, and its pipelines call it after each image."""
    model, resets = routed(), []
    model._reset_stateful_cache = lambda: resets.append(len(model.drops))
    generate(model, Sampler(steps=3), NOISE, [0], [0])
    assert resets == [3]


def test_a_curve_that_drops_nothing_fits_any_model(oracle):
    zero = generate(oracle(NOISE), Sampler(steps=3, tail_drop=((0.2, 0.0), (0.8, 0.0))), NOISE, [0], [0])
    plain = generate(oracle(NOISE), Sampler(steps=3), NOISE, [0], [0])
    assert torch.equal(zero.images, plain.images)
    with pytest.raises(UnsupportedModelError, match="tail_drop"):
        generate(oracle(NOISE), Sampler(steps=3, tail_drop=((0.0, 0.1), (0.8, 0.0))), NOISE, [0], [0])


def test_images_are_ordinary_tensors_and_the_mode_is_restored(routed):
    model = routed().train()
    images = generate(model, Sampler(steps=2), NOISE, [0], [0]).images
    assert model.training
    assert not images.is_inference()
    assert all(record.seconds > 0 for record in generate(model.eval(), Sampler(steps=2), NOISE, [0], [0]).steps)
    assert not model.training


def test_autocast_and_half_weights_are_near_single_precision(routed):
    sampler = Sampler(steps=5, scheduler="ddim")
    exact = generate(routed(), sampler, NOISE, [0, 1], [0, 1]).images
    cast = generate(routed(), sampler, NOISE, [0, 1], [0, 1], dtype=torch.bfloat16).images
    half = generate(routed().bfloat16(), sampler, NOISE, [0, 1], [0, 1]).images
    for images in (cast, half):
        assert images.dtype == torch.float32
        error = (images - exact).square().mean().sqrt() / exact.std()
        assert 0 < float(error) < 0.2  # bfloat16 has 3 digits, and a token at the threshold may be kept or dropped


def test_compiled_models_take_a_tail_drop(routed):
    model = torch.compile(routed(), backend="eager")
    made = generate(model, Sampler(steps=2, tail_drop=0.5), NOISE, [0], [0])
    torch.testing.assert_close(made.images, generate(routed(), Sampler(steps=2, tail_drop=0.5), NOISE, [0], [0]).images)


@pytest.mark.parametrize(
    ("objective", "sampler", "values"),
    [
        (NOISE, {"scheduler": "euler"}, "scheduler=euler .*noise .*ddpm, ddim or dpm"),
        (FLOW, {"scheduler": "ddim"}, "scheduler=ddim .*flow .*euler"),
        (NOISE, {"steps": 1001}, "scheduler=ddpm .*2 to 1000 .*1001"),
        (NOISE, {"steps": 1}, "scheduler=ddpm .*2 to 1000 .*1:.*ddim"),
        (NOISE, {"steps": 1001, "scheduler": "dpm"}, "scheduler=dpm .*1 to 1000 .*1001"),
    ],
)
def test_settings_that_do_not_fit_the_objective_are_refused(oracle, objective, sampler, values):
    with pytest.raises(RecipeError, match=values):
        generate(oracle(objective), Sampler(**sampler), objective, [0], [0])


@pytest.mark.parametrize(
    ("labels", "seeds", "values"),
    [
        ([3], [0], " 3 .*0 to 1"),
        ([0, 1], [0], "2 labels .*1 seeds"),
        ([], [], "0 labels .*0 seeds"),
        ([0], [-1], " -1 "),
    ],
)
def test_labels_and_seeds_that_do_not_fit_are_refused(oracle, labels, seeds, values):
    with pytest.raises(InputError, match=values):
        generate(oracle(NOISE), Sampler(), NOISE, labels, seeds)


@pytest.mark.parametrize("settings", [{"tail_drop": 0.3}, {"guidance": 2.0, "uncond_tail_drop": 0.9}])
def test_a_tail_drop_of_a_model_without_routing_is_refused(oracle, settings):
    with pytest.raises(UnsupportedModelError, match=r"GaussianOracle.*tail_drop"):
        generate(oracle(NOISE), Sampler(**settings), NOISE, [0], [0])


@pytest.mark.parametrize(
    "settings", [{"guidance_interval": (0.5, 0.2)}, {"tail_drop": 1.2}, {"steps": 0}, {"shift": 2}, {"guidance": -1}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        Sampler(**settings)
