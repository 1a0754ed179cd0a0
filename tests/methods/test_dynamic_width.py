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


def basis(level):
    """Cosines and sines of 1000 times the level, at the frequencies of a timestep embedding."""
    half = WidthGates.FREQUENCIES // 2
    angle = 1000.0 * level.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize("embedding", [None, 24])
@pytest.mark.parametrize("settings", [{}, {"heads": False}, {"channels": False}])
def test_gates_by_level_are_their_formula(embedding, settings):
    gates = DynamicWidth(**settings, embedding=embedding).build(SIZES)
    for layer in (gates.heads, gates.channels):
        if layer is not None:
            torch.nn.init.normal_(layer.weight, std=0.1)
            torch.nn.init.normal_(layer.bias)
    level = torch.tensor([0.0, 0.4, 1.0])
    x = basis(level)
    if embedding is not None:
        first, _, last = gates.embedding
        x = x @ first.weight.double().T + first.bias.double()
        x = x * x.sigmoid() @ last.weight.double().T + last.bias.double()
    for layer, found in zip((gates.heads, gates.channels), gates(level), strict=True):
        if layer is None:
            assert found is None
        else:
            expected = (x @ layer.weight.double().T + layer.bias.double()).view(3, 3, 3)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-3)  # fp32 angles up to 1000


def test_gates_of_tokens_are_a_network_of_their_own_in_each_block():
    gates = DynamicWidth().build(Sizes(width=64, heads=4, weights=(1, 1)))
    x = torch.randn(2, 5, 64)
    for block, (first, _, last) in enumerate(gates.tokens):
        assert first.out_features == 64 // 16
        torch.nn.init.normal_(last.weight)
        expected = (first(x).relu() @ last.weight[0] + last.bias).detach()
        torch.testing.assert_close(gates.token_logits(block, x), expected)
    assert not torch.equal(gates.token_logits(0, x), gates.token_logits(1, x))
    narrow = DynamicWidth().build(Sizes(width=8, heads=2, weights=(1,)))
    assert narrow.tokens[0][0].out_features == 1


def test_gates_compute_in_the_type_of_their_weights():
    gates = DynamicWidth(embedding=8).build(SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        assert {each.dtype for each in gates(torch.tensor([0.5]))} == {torch.float32}
        assert gates.token_logits(0, torch.randn(1, 3, 32).bfloat16()).dtype == torch.float32
    half = DynamicWidth(embedding=8).build(SIZES).bfloat16()
    assert {each.dtype for each in half(torch.tensor([0.5]))} == {torch.bfloat16}


def test_a_single_head_leaves_the_tokens_to_choose():
    one = Sizes(width=32, heads=1, weights=(1, 1))
    gates = DynamicWidth(embedding=8).build(one)
    assert (gates.heads, gates.channels, gates.embedding) == (None, None, None)
    assert gates(torch.tensor([0.5])) == (None, None)
    assert len(gates.tokens) == 2
    only = DynamicWidth(heads=False, channels=False, embedding=8).build(SIZES)
    assert only.embedding is None


def test_the_target_falls_from_everything_over_the_warmup():
    steady, falling = DynamicWidth(target=0.6), DynamicWidth(target=0.6, warmup=10)
    gates = steady.build(SIZES)
    assert gates.calls == 0
    assert gates.target(steady) == 0.6
    for calls, expected in ((0, 1.0), (5, 0.8), (10, 0.6), (20, 0.6)):
        gates.calls.fill_(calls)
        assert float(gates.target(falling)) == pytest.approx(expected)
    assert "calls" in gates.state_dict()  # a resumed run goes on where it was


def test_gates_start_beyond_the_noise():
    """The noise of a gate ends at logit(1 - 1e-6) = 13.8."""
    assert WidthGates.OPEN > 13.82
    assert WidthGates.OPEN_TOKENS > WidthGates.OPEN
