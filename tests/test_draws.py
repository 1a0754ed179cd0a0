"""What is drawn for an image is a function of its key: not of its batch, of the device or of earlier draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokdyn
from tests.upcycling.models import inputs, small_base
from tokdyn import DCDiT, DepthSkip, DynamicWidth, TokenDrop, draws
from tokdyn.diffusion.objective import Objective
from tokdyn.division import BatchPart, computing, current
from tokdyn.methods import Method, SkipGates, WidthGates
from tokdyn.recipe import ChunkingSettings
from tokdyn.seeds import Draw, Stream, image_keys, mixed
from tokdyn.train.schedule import tail_drop
from tokdyn.train.step import draw
from tokdyn.upcycling.phases import PhaseBatch
from tokdyn.upcycling.settings import PhaseSettings, UpcycleSettings

OBJECTIVES = [
    Objective(),
    Objective(kind="flow"),
    Objective(kind="flow", timestep_sampling="logit_normal"),
]
HANDOVER = PhaseSettings(name="a", steps=3, plan="handover")
UPCYCLE = UpcycleSettings(base="b", phases=(HANDOVER, PhaseSettings(name="b")))
SAMPLED = ChunkingSettings(budget_warmup_steps=0, draw="sample")

seeds, steps, places = st.integers(0, 2**70), st.integers(0, 10**7), st.integers(0, 10**5)


@given(seeds, steps, places, st.integers(1, 9), st.lists(st.integers(0, 300), max_size=3))
def test_bits_are_those_of_the_hash_of_all_seeds(
    seed: int, step: int, first: int, count: int, purpose: list[int]
) -> None:
    """In integers of torch, which have a sign, against those of numpy, which have none."""
    found = draws.bits(image_keys(seed, step, first, 3), count, *purpose)
    for row, place in enumerate(range(first, first + 3)):
        for index in range(count):
            (expected,) = mixed(seed, Stream.IMAGE, step, place, *purpose, index).tolist()
            assert int(found[row, index]) % 2**64 == expected


@given(seeds, steps, places, st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(OBJECTIVES))
def test_draws_do_not_depend_on_the_division_of_the_batch(
    seed: int, step: int, first: int, sizes: Sequence[int], objective: Objective
) -> None:
    def part(first: int, count: int) -> list[Tensor]:
        x, labels = torch.zeros(count, 1, 3, 3), torch.zeros(count, dtype=torch.int64)
        drops = tail_drop(SAMPLED, seed, step, first, count)
        found = draw(objective, x, labels, 5, 0.5, image_keys(seed, step, first, count), drops)
        plan = PhaseBatch.draw(UPCYCLE, seed, step % 3, first, count).on_fixed_plan
        return [found.noised.noise, found.noised.timestep, found.labels, torch.as_tensor(found.tail_drop), plan]

    whole = part(first, sum(sizes))
    parts = [part(first + sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    for values, *pieces in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(pieces), values, rtol=2e-7, atol=2e-7)  # an fp64 rounded to another fp32
        assert values.dtype.is_floating_point or torch.equal(torch.cat(pieces), values)


def test_a_longer_draw_begins_as_a_shorter_one() -> None:
    keys = image_keys(0, 0, 0, 2)
    assert torch.equal(draws.uniform(keys, 9, 4)[:, :5], draws.uniform(keys, 5, 4))


def test_numbers_have_their_distributions() -> None:
    """160,000 numbers; five standard deviations of each estimate."""
    keys = image_keys(3, 1, 0, 400)
    count = len(keys) * 400
    uniform = draws.uniform(keys, 400, Draw.LABEL).double()
    assert 0.0 <= uniform.min() < uniform.max() < 1.0
    counts = torch.histc(uniform, 20, 0.0, 1.0)
    assert (counts - count / 20).abs().max() < 5 * math.sqrt(count / 20)
    integers = draws.integers(keys, 400, 7, Draw.TIMESTEP).flatten()
    assert (torch.bincount(integers, minlength=7) - count / 7).abs().max() < 5 * math.sqrt(count / 7)
    normal = draws.normal(keys, 400, Draw.NOISE)
    assert normal.dtype == torch.float32
    moments = [(normal.double() ** power).mean().item() for power in (1, 2, 3, 4)]
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert found == pytest.approx(expected, abs=5 * math.sqrt(variance / count))
    below = (normal[None] < torch.tensor([-3.0, -1.0, 0.5, 2.0])[:, None, None]).double().mean(dim=(1, 2))
    expected = torch.special.ndtr(torch.tensor([-3.0, -1.0, 0.5, 2.0]).double())
    assert ((below - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_pixels_images_steps_and_purposes_are_uncorrelated() -> None:
    """Correlations of 4,096 numbers have a standard deviation of 1/64; five of those."""

    def noise(step: int, first: int, purpose: int) -> Tensor:
        return draws.normal(image_keys(0, step, first, 2), 4096, purpose)

    first = noise(0, 0, 0)
    others = [first.roll(1, 1), first.roll(2048, 1), first.roll(1, 0), noise(1, 0, 0), noise(0, 2, 0), noise(0, 0, 1)]
    for other in others:
        assert (first * other).mean(dim=1).abs().max() < 5 / 64


def test_noise_is_mixed_in_at_the_timesteps_of_training() -> None:
    x0, keys = torch.randn(2000, 1, 2, 2), image_keys(0, 0, 0, 2000)
    for objective in OBJECTIVES:
        noised = objective.add_own_noise(x0, keys)
        torch.testing.assert_close(noised.x_t, objective.mix(x0, noised.noise, noised.timestep).x_t)
        drawn = objective.add_noise(x0, torch.Generator().manual_seed(0)).timestep
        assert noised.timestep.dtype == drawn.dtype
        quantiles = torch.linspace(0.1, 0.9, 5).double()
        # A median of 2,000 uniform numbers in 1,000 has a standard deviation of 11; five, and as many of the other's.
        difference = noised.timestep.double().quantile(quantiles) - drawn.double().quantile(quantiles)
        assert difference.abs().max() < 80


def part_of(keys: Tensor) -> BatchPart:
    return BatchPart(keys, lambda name, values, group: values.mean().expand(len(values)))


METHODS = [
    [DepthSkip(learned=True)],
    [TokenDrop(rate=0.5, blocks=(0, 1))],
    [DynamicWidth(target=0.5)],
    [TokenDrop(rate=0.25, blocks=(0, 1)), DynamicWidth(target=0.5, heads=False)],
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("methods", METHODS, ids=lambda methods: "+".join(type(each).__name__ for each in methods))
def test_what_a_method_draws_for_an_image_does_not_depend_on_its_batch(
    methods: list[Method], checkpointing: bool
) -> None:
    model = tokdyn.wrap(small_base(), methods).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    for gates in model.tokdyn.modules():  # gates that are as often shut as open
        layers = [gates.score] if isinstance(gates, SkipGates) else []
        if isinstance(gates, WidthGates):
            layers = [layer for layer in (gates.heads, gates.channels) if layer is not None]
            layers += [each[-1] for each in gates.tokens]  # type: ignore[index,union-attr]
        for layer in layers:
            torch.nn.init.zeros_(layer.bias)
    x, timestep, labels = inputs()
    check_alone(model, x, timestep, labels)


def test_a_random_router_draws_for_each_image() -> None:
    settings = {"hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 5, "router": "random"}
    model = DCDiT(sample_size=16, in_channels=3, patch_size=2, **settings).train()
    torch.nn.init.normal_(model.final_layer.linear.weight)  # a new head predicts zeros
    check_alone(model, *inputs())


def check_alone(model: tokdyn.DiT | DCDiT, x: Tensor, timestep: Tensor, labels: Tensor) -> None:
    """Compare images that are computed together with each by itself, and gradients too; other draws change them."""
    keys = image_keys(0, 1, 0, len(x))

    def computed(keys: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with computing(part_of(keys[rows])):
            out = model(x[rows], timestep[rows], labels[rows]).sample
            model.zero_grad()
            out.square().sum().backward()
        weight = model.blocks[0].attn.qkv.weight
        return out.detach(), torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()

    whole, gradient = computed(keys, slice(None))
    alone = [computed(keys, slice(row, row + 1)) for row in range(len(x))]
    torch.testing.assert_close(torch.cat([out for out, _ in alone]), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(each for _, each in alone), gradient, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(computed(image_keys(0, 2, 0, len(x)), slice(None))[0], whole, atol=1e-3)
    assert current() is None


def test_means_of_losses_are_those_of_the_whole_batch() -> None:
    """A part whose mean is 0.25 of a batch whose mean is 0.75 has the slope of the batch's loss."""
    values = torch.tensor([0.125, 0.375], requires_grad=True)
    part = BatchPart(image_keys(0, 0, 0, 2), lambda name, values, group: torch.full((2,), 0.75))
    loss = (part.over_batch("loss", values).mean() - 0.5) ** 2
    loss.backward()
    assert loss.item() == pytest.approx(0.0625)
    assert values.grad.tolist() == pytest.approx([2 * 0.25 / 2] * 2)  # type: ignore[union-attr]
