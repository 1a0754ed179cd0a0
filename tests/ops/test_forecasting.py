"""Forecasts of the effect against plain readings of their papers, and the laws that they obey."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.ops.forecasting import chebyshev, chebyshev_weights, taylor_weights

levels = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True).map(
    lambda found: [value / 40 for value in sorted(found)]
)


def table(*rows, width=None):
    """(B, K) levels of samples that have computed different numbers of steps."""
    width = width or max(map(len, rows))
    return torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64)


def taylorseer(effects, distance, ahead, order):
    """TaylorSeer's forecast, arXiv 2503.06923: effects at equal distances, the last one first; a plain loop."""
    differences, total = list(effects), 0.0
    for i in range(min(order, len(effects) - 1) + 1):
        total += differences[0] * ahead**i / (math.factorial(i) * distance**i)
        differences = [now - before for now, before in pairwise(differences)]
    return total


def spectrum(values, nodes, level, degree, ridge):
    """Spectrum's forecast, arXiv 2603.01623: the coefficients of a ridge regression, and their polynomial."""
    features = torch.tensor([[math.cos(m * math.acos(2 * node - 1)) for m in range(degree + 1)] for node in nodes])
    features = features.double()
    stacked = torch.cat([features, math.sqrt(ridge) * torch.eye(degree + 1, dtype=torch.float64)])
    targets = torch.cat([torch.tensor(values).double(), torch.zeros(degree + 1, dtype=torch.float64)])
    coefficients = torch.linalg.lstsq(stacked, targets[:, None]).solution[:, 0]
    return sum(c.item() * math.cos(m * math.acos(2 * level - 1)) for m, c in enumerate(coefficients))


@pytest.mark.parametrize("order", [0, 1, 2])
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 6))
def test_taylor_forecasts_are_those_of_the_paper_where_steps_are_equally_far_apart(order, values, distance, ahead):
    """A step is a hundredth of the noise, so that both count the same distances; tolerance of fp64 sums."""
    nodes = [0.4 + 0.01 * distance * k for k in range(len(values))]  # noise falls, so older steps have more of it
    weights = taylor_weights(table(nodes), torch.tensor([0.4 - 0.01 * ahead], dtype=torch.float64), order)
    expected = taylorseer(values, distance, ahead, order)
    assert float(weights[0] @ torch.tensor(values).double()) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(levels, st.floats(0, 1), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_taylor_forecasts_at_unequal_distances(nodes, level, constant, slope, bend):
    """A constant by every order, a line from order 1 on, and the curvature of a parabola by order 2, all exactly."""
    wanted, x = torch.tensor([level], dtype=torch.float64), torch.tensor(nodes, dtype=torch.float64)

    def forecast(values, order):
        return float(taylor_weights(x[None], wanted, order)[0] @ values)

    for order in (0, 1, 2):
        assert forecast(torch.ones_like(x), order) == pytest.approx(1, abs=1e-8)
    if len(nodes) > 1:
        for order in (1, 2):
            assert forecast(constant + slope * x, order) == pytest.approx(constant + slope * level, abs=1e-6)
    if len(nodes) > 2:
        ahead = level - nodes[0]
        slope = bend * (nodes[0] + nodes[1])  # of the parabola's chord through the last two steps
        expected = bend * nodes[0] ** 2 + slope * ahead + bend * ahead**2
        assert forecast(bend * x**2, 2) == pytest.approx(expected, abs=1e-6)


def test_fewer_computed_steps_than_the_order_needs_lower_the_order():
    nodes, level = table([0.5], [0.5, 0.6], [0.5, 0.6, 0.8], width=4), torch.tensor([0.3] * 3, dtype=torch.float64)
    weights = taylor_weights(nodes, level, 2)
    for sample, order in enumerate((0, 1, 2)):
        torch.testing.assert_close(weights[sample], taylor_weights(nodes, level, order)[sample])
        assert weights[sample, order] != 0
        assert not weights[sample, order + 1 :].any()
    nodes, level = table([0.5], [0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8, 0.9]), torch.full((3,), 0.3).double()
    few, line = chebyshev_weights(nodes, level), taylor_weights(nodes, level, 1)
    torch.testing.assert_close(few[:2], line[:2])
    assert not torch.allclose(few[2], line[2], atol=0.1)  # five determine polynomials of degree four


@given(st.lists(st.integers(0, 40), min_size=5, max_size=8, unique=True), st.integers(0, 40), st.floats(1e-3, 1.0))
def test_chebyshev_forecasts_are_those_of_the_paper(found, target, ridge):
    nodes = [value / 40 for value in found]
    values = [math.sin(5 * node) + node for node in nodes]
    weights = chebyshev_weights(table(nodes, width=9), torch.tensor([target / 40], dtype=torch.float64), 4, ridge)
    expected = spectrum(values, nodes, target / 40, 4, ridge)
    assert float(weights[0, : len(nodes)] @ torch.tensor(values).double()) == pytest.approx(expected, abs=1e-4)
    assert not weights[0, len(nodes) :].any()


def test_chebyshev_polynomials_are_fitted_exactly_without_a_ridge():
    nodes = torch.linspace(0.4, 1, 7, dtype=torch.float64)
    weights = chebyshev_weights(nodes[None], torch.tensor([0.3], dtype=torch.float64), 4, 1e-12)
    for power in range(5):
        assert float(weights[0] @ nodes**power) == pytest.approx(0.3**power, abs=1e-4)


def test_chebyshev_polynomials_are_cosines():
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    expected = torch.stack([torch.cos(m * torch.acos(x)) for m in range(5)], dim=1)
    torch.testing.assert_close(chebyshev(x, 4), expected)
    torch.testing.assert_close(chebyshev(x, 0), expected[:, :1])


def test_samples_have_histories_of_their_own():
    """A batch of unlike samples gets the weights that each of them gets alone."""
    rows = [[0.5, 0.7, 0.8], [0.1], [0.2, 0.3, 0.5, 0.6, 0.8, 0.9]]
    level = torch.tensor([0.4, 0.05, 0.1], dtype=torch.float64)
    for weigh in (lambda *given: taylor_weights(*given, 2), chebyshev_weights):
        together = weigh(table(*rows), level)
        for sample, row in enumerate(rows):
            alone = weigh(table(row), level[sample : sample + 1])
            torch.testing.assert_close(together[sample, : len(row)], alone[0], rtol=0, atol=1e-9)
            assert not together[sample, len(row) :].any()
