"""Inputs are compared by a few elements: they decide what all would decide, or err towards computing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trace.test_trajectory import call, on_host
from tokdyn.trace.comparison import FEW, RESEMBLES, SAME, SAMPLED, Comparison, InputSeen, Prediction, take
from tokdyn.trace.conditioning import Conditioning
from tokdyn.trace.trajectory import Trajectory

__all__ = ["on_host"]  # a fixture of every test here
SHAPES = {"latents": (1, 4, 64, 64), "packed tokens": (1, 1024, 64), "video": (1, 4, 8, 32, 32)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compared(x: torch.Tensor, before: torch.Tensor, elements: int, on_host: bool) -> Comparison:
    return Comparison(InputSeen.of(x, elements, on_host), InputSeen.of(before, elements, on_host))


def read(comparison: Comparison) -> list[tuple[float, float]]:
    return comparison.read(*(column.tolist() for column in comparison.columns))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 3))
def test_a_sample_decides_what_all_elements_decide(seed: int, share: float, batch: int) -> None:
    before = noise(seed, batch, 4, 32, 32)
    x = share * before + (1 - share) * noise(seed + 1, batch, 4, 32, 32)
    whole = read(compared(x, before, 10**9, on_host=False))
    for found in (read(compared(x, before, SAMPLED, each)) for each in (True, False)):
        for (alike, moved), (expected, distance) in zip(found, whole, strict=True):
            if abs(expected - RESEMBLES) > 0.1:
                assert (alike >= RESEMBLES) == (expected >= RESEMBLES)
            if alike >= RESEMBLES and alike != SAME:
                assert moved == pytest.approx(distance, rel=0.5, abs=1e-3)


@shapes
def test_the_elements_lie_everywhere(shape: tuple[int, ...]) -> None:
    """Every row, column, channel and token group is looked at, in a share like its own."""
    for axis in range(1, len(shape)):
        size = min(shape[axis], 16)
        places = torch.arange(shape[axis]).mul(size).div(shape[axis], rounding_mode="floor")
        where = places.view([-1 if each == axis else 1 for each in range(len(shape))]).expand(shape)
        counts = torch.bincount(take(where, SAMPLED).flatten(), minlength=size)
        assert counts.min() > 0.5 * SAMPLED / size
        assert counts.max() < 1.5 * SAMPLED / size


@shapes
@pytest.mark.parametrize("share", [0.5, 0.02], ids=["half", "little"])
def test_a_picture_that_changes_in_a_part_goes_on_and_another_does_not(shape: tuple[int, ...], share: float) -> None:
    """Inpainting and reference images: the rest of the input stays what it is in every step."""
    trajectory, rest = Trajectory(), noise(0, *shape)
    part = torch.zeros(shape).flatten()
    part[: round(share * part.numel())] = 1
    part = part.view(shape)

    def step(seed: int, scale: float) -> torch.Tensor:
        return torch.where(part > 0, scale * noise(seed, *shape), rest)

    first, second = call(trajectory, step(1, 1.0), 0.9), call(trajectory, step(1, 0.95), 0.8)
    third = call(trajectory, step(1, 0.9), 0.7)
    compared_at_once = share * SAMPLED > FEW  # else more elements are compared from now on
    assert (second.images == first.images) == compared_at_once
    assert third.images == second.images
    other = call(trajectory, step(2, 0.85), 0.6)
    assert other.images != third.images
    assert call(trajectory, step(2, 0.8), 0.5).images == other.images


def test_copies_of_one_input_both_explain_the_next() -> None:
    """A pipeline that copies the latents for each branch: the next latents come from both predictions."""
    trajectory, x, one, other = Trajectory(), *(noise(seed, 1, 4, 32, 32) for seed in range(3))
    first = call(trajectory, x, 0.9, text=noise(5, 1, 8))
    trajectory.note((one,))
    assert call(trajectory, x.clone(), 0.9, text=noise(6, 1, 8)).place == 1
    trajectory.note((other,))
    following = 0.1 * x + 3 * one + 0.3 * other
    assert call(trajectory, following, 0.8, text=noise(5, 1, 8)).images == first.images


def test_a_prediction_that_was_written_over_explains_nothing(on_host: bool) -> None:
    before, predicted, other = (noise(seed, 1, 4, 32, 32) for seed in range(3))
    seen = InputSeen.of(before, SAMPLED, on_host)
    noted = Prediction.of(predicted, seen)
    assert noted is not None
    seen.predictions.append(noted)

    def alike(following: torch.Tensor) -> float:
        return read(Comparison(InputSeen.of(following, SAMPLED, on_host), seen))[0][0]

    assert alike(0.1 * before + 3 * predicted) > 0.99
    predicted.copy_(other)
    assert alike(0.1 * before + 3 * other) < RESEMBLES


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_resemble_nothing(value: float) -> None:
    trajectory, images = Trajectory(), set()
    for step, level in enumerate((0.9, 0.8, 0.7)):
        x = (1 - 0.05 * step) * noise(0, 1, 4, 32, 32)
        images.add(call(trajectory, torch.where(x > 1, value, x), level).images)
    assert len(images) == 3


def test_conditioning_that_is_written_over_is_noticed(on_host: bool) -> None:
    known, x, labels = Conditioning(2), noise(0, 2, 4, 8, 8), torch.tensor([1, 2])

    def values(**arguments: object) -> torch.Tensor:
        return known.of({"hidden_states": x, "timestep": torch.rand(2), **arguments}, x, on_host).values

    first = values(class_labels=labels).clone()
    assert torch.equal(values(class_labels=labels), first)
    labels[1] = 7
    assert not torch.equal(values(class_labels=labels), first)
    assert torch.equal(values(class_labels=torch.tensor([1, 2])), first)
    texts = [[noise(seed, 3, 4) for seed in (one, 1)] for one in (0, 2)]
    assert not torch.equal(values(text=texts[0]), values(text=texts[1]))
