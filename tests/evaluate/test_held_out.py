"""The held-out loss: the same noise for every model, and the number that a loop of one's own finds."""

from __future__ import annotations

import pytest
import torch

from tests.test_sample import tiny
from tokdyn import DiT
from tokdyn.data import DataConfig, open_data
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import InputError
from tokdyn.evaluate.held_out import held_out_loss

DATA = open_data(DataConfig(kind="shapes", size=16, length=40, num_classes=4))


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_it_does_not_depend_on_batches_and_repeats_itself(kind: str) -> None:
    objective = Objective(kind=kind)
    model = tiny(0, DiT, sample_size=16, learn_sigma=objective.learn_sigma).train()
    one = held_out_loss(model, objective, DATA, images=30, batch_size=7)
    other = held_out_loss(model, objective, DATA, images=30, batch_size=30)
    assert model.training
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.by_level == pytest.approx(other.by_level, rel=1e-4)
    assert one.spread > 0
    assert one.kept is None
    assert held_out_loss(model, objective, DATA, images=30, seed=1).loss != one.loss
    twice = held_out_loss(model, objective, DATA, images=30, repeats=2)
    single = [held_out_loss(model, objective, DATA, images=30, seed=seed).loss for seed in (0, 1)]
    assert twice.loss == pytest.approx(sum(single) / 2, rel=1e-5)


def test_a_model_that_says_nothing_has_the_loss_of_the_noise() -> None:
    """Mean of squared standard normal numbers over 40 x 768 values: 1 within 5 standard errors."""
    model = tiny(0, DiT, sample_size=16)
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.nn.init.zeros_(model.final_layer.linear.bias)
    found = held_out_loss(model, Objective(), DATA)
    assert found.images == 40
    assert found.loss == pytest.approx(1.0, abs=5 * (2 / (40 * 768)) ** 0.5)
    known = [value for value in found.by_level if value is not None]
    assert known == pytest.approx([1.0] * len(known), abs=0.3)


def test_budgets_change_what_is_kept() -> None:
    model = tiny(0, sample_size=16)
    full, half = (held_out_loss(model, Objective(), DATA, tail_drop=drop) for drop in (0.0, 0.5))
    along = held_out_loss(model, Objective(), DATA, tail_drop=((0.45, 0.0), (0.55, 0.5)))  # at five of ten bins each
    assert half.kept < along.kept < full.kept
    assert along.by_level[0] == pytest.approx(full.by_level[0])
    assert along.by_level[-1] == pytest.approx(half.by_level[-1])
    assert half.kept < full.kept <= 1
    assert half.loss != full.loss
    with pytest.raises(InputError, match="at least 2 images"):
        held_out_loss(model, Objective(), DATA, images=1)
