"""Settings and gates of dynamic width."""

import pytest
import torch

from tokdyn import DynamicWidth, InputError
from tokdyn.methods import Sizes, WidthGates
from tokdyn.ops.skipping import gate, gumbel_difference

SIZES = Sizes(width=32, heads=4, weights=(100, 100, 100))


def test_settings_without_effect_are_refused():
    with pytest.raises(InputError, match="heads, channels and tokens"):
        DynamicWidth(heads=False, channels=False, tokens=False)
    with pytest.raises(InputError, match="tokens=True"):
        DynamicWidth(tokens=False).build(Sizes(width=32, heads=1, weights=(100,)))


@pytest.mark.parametrize("settings", [{}, {"heads": False}, {"channels": False}, {"tokens": False}])
def test_gates_are_there_for_what_is_chosen_and_start_open(settings):
    method = DynamicWidth(**settings)
    gates = method.build(SIZES)
    assert isinstance(gates, WidthGates)
    logits = gates(torch.tensor([0.0, 0.5, 1.0]))
    for name, found in zip(("heads", "channels"), logits, strict=True):
        assert (found is not None) == getattr(method, name)
        assert found is None or (found.shape == (3, 3, 3) and (found == WidthGates.OPEN).all())
    assert (gates.tokens is not None) == method.tokens
    if gates.tokens is not None:  # whatever the tokens are
        assert (gates.token_logits(1, 1e4 * torch.randn(2, 5, 32)) == WidthGates.OPEN_TOKENS).all()


def test_nothing_is_built_where_everything_stays_on():
    assert DynamicWidth(target=1.0).build(SIZES) is None


def test_at_the_start_nothing_is_drawn_shut():
    torch.manual_seed(0)
    assert (gate(torch.full((3_000_000,), WidthGates.OPEN), training=True) == 1).all()


def test_the_difference_of_two_gumbel_numbers_opens_a_gate_with_the_probability_of_its_sigmoid():
    torch.manual_seed(0)
    logit = torch.tensor([-2.0, 0.0, 1.0]).expand(200_000, 3)
    share = (logit + gumbel_difference(logit) > 0).float().mean(0)
    torch.testing.assert_close(share, torch.sigmoid(logit[0]), rtol=0, atol=0.005)  # five standard deviations
