"""The held-out loss: the same noise for every model, other noise for every image, seed and repeat."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.sampling import tiny
from tokdyn import DiT
from tokdyn.data import DataConfig, open_data
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import InputError
from tokdyn.evaluate.held_out import HeldOutLoss, held_out_loss

DATA = open_data(DataConfig(kind="shapes", size=16, length=40, num_classes=4))


def filled(result: HeldOutLoss) -> list[float]:
    """Return the means of the bins that are not empty."""
    return [mean for mean in result.by_level if mean is not None]


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_the_loss_is_reproducible_and_independent_of_batches(kind: str) -> None:
    objective = Objective(kind=kind)
    model = tiny(0, DiT, sample_size=16, learn_sigma=objective.learn_sigma).train()
    one = held_out_loss(model, objective, DATA, images=30, batch_size=7)
    other = held_out_loss(model, objective, DATA, images=30, batch_size=30)
    assert model.training
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert [mean is None for mean in one.by_level] == [mean is None for mean in other.by_level]
    assert filled(one) == pytest.approx(filled(other), rel=1e-4)
    assert one.spread > 0
    assert one.kept is None
    assert held_out_loss(model, objective, DATA, images=30, seed=1).loss != one.loss
    twice = held_out_loss(model, objective, DATA, images=30, repeats=2)
    single = [held_out_loss(model, objective, DATA, images=30, seed=seed).loss for seed in (0, 1)]
    assert twice.loss == pytest.approx(sum(single) / 2, rel=1e-5)


def test_a_model_that_predicts_zero_has_the_loss_of_the_noise() -> None:
    """The mean of 40 x 768 squared standard normal values is 1 within 5 standard errors."""
    model = tiny(0, DiT, sample_size=16)
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.nn.init.zeros_(model.final_layer.linear.bias)
    result = held_out_loss(model, Objective(), DATA)
    assert result.images == 40
    assert result.loss == pytest.approx(1.0, abs=5 * (2 / (40 * 768)) ** 0.5)
    assert filled(result) == pytest.approx([1.0] * len(filled(result)), abs=0.3)


class Recorder(torch.nn.Module):
    """Records what it is given, and predicts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.inputs: list[torch.Tensor] = []
        self.times: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        self.inputs.append(x)
        self.times.append(timestep / 1000)
        self.labels.append(class_labels)
        return SimpleNamespace(sample=torch.zeros_like(x))


def draws(seed: int, repeats: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise (repeats, 12, 768) and times (repeats, 12) of the first 12 images, from the inputs of a flow."""
    model, data = Recorder(), open_data(DataConfig(kind="shapes", size=16, length=12))
    held_out_loss(model, Objective(kind="flow"), data, images=12, repeats=repeats, seed=seed)
    inputs, times = torch.stack(model.inputs), torch.stack(model.times)
    clean, _ = data.batch(range(12))
    share = times[..., None, None, None]
    return ((inputs - (1 - share) * clean) / share).flatten(2), times


def test_noise_differs_by_image_seed_and_repeat() -> None:
    """Correlations of 768 independent values are below 6 standard errors; shared noise has a correlation of 1."""
    noise = torch.cat([draws(0, repeats=3)[0], *(draws(seed)[0] for seed in (3, 2**32, 2**33, 2**40))]).flatten(0, 1)
    others = torch.corrcoef(noise) - torch.eye(len(noise))
    assert others.abs().max() < 6 / 768**0.5


def test_times_differ_by_seed_and_repeat() -> None:
    times = torch.cat([draws(0, repeats=3)[1], *(draws(seed)[1] for seed in (3, 2**32, 2**33, 2**40))])
    assert len({tuple(row.tolist()) for row in times}) == len(times)
    assert torch.equal((times.sort(dim=1).values * 12).floor(), torch.arange(12.0).expand(len(times), 12))


def test_a_repeat_is_the_next_seed() -> None:
    twice, (first, second) = draws(5, repeats=2)[0], (draws(seed)[0][0] for seed in (5, 6))
    assert torch.equal(twice[0], first)
    assert torch.equal(twice[1], second)


def test_images_are_taken_evenly() -> None:
    """Image i has the label i mod 10."""
    model = Recorder()
    held_out_loss(model, Objective(kind="flow"), open_data(DataConfig(kind="shapes", size=16, length=10)), images=4)
    assert torch.cat(model.labels).tolist() == [0, 2, 5, 7]


def test_loss_spread_and_means_by_level_equal_their_definitions() -> None:
    """The recorder predicts zero for the target noise - x_0; a flow's time is its noise level."""
    noise, times = draws(0, repeats=2)
    data = open_data(DataConfig(kind="shapes", size=16, length=12))
    losses = (noise - data.batch(range(12))[0].flatten(1)).square().mean(2)
    result = held_out_loss(Recorder(), Objective(kind="flow"), data, images=12, repeats=2, bins=4)
    assert result.loss == pytest.approx(float(losses.mean()), rel=1e-4)
    assert result.spread == pytest.approx(float(losses.mean(0).std()) / 12**0.5, rel=1e-4)
    assert result.levels == (0.125, 0.375, 0.625, 0.875)
    expected = [float(losses[(times * 4).floor() == number].mean()) for number in range(4)]
    assert result.by_level == pytest.approx(expected, rel=1e-4)


def test_budgets_change_what_is_kept() -> None:
    model = tiny(0, sample_size=16)
    full, half = (held_out_loss(model, Objective(), DATA, tail_drop=drop) for drop in (0.0, 0.5))
    along = held_out_loss(model, Objective(), DATA, tail_drop=((0.45, 0.0), (0.55, 0.5)))  # at five of ten bins each
    assert half.kept < along.kept < full.kept
    assert along.by_level[0] == pytest.approx(full.by_level[0])
    assert along.by_level[-1] == pytest.approx(half.by_level[-1])
    assert half.kept < full.kept <= 1
    assert half.loss != full.loss
    with pytest.raises(InputError, match="at least 2"):
        held_out_loss(model, Objective(), DATA, images=1)
