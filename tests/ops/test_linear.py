"""Linear layers on the CPU: row counts, hooks, parameters of any layout, kept casts, checkpoints and FLOP counters."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.ops import torch_private
from tokdyn.ops.cpu.linear import empty_rows
from tokdyn.ops.layers import kept_casts, linear, weights_cast_once
from tokdyn.ops.precision import cpu_multiplies

halves = pytest.mark.skipif(not cpu_multiplies(torch.bfloat16), reason="the processor has no instructions for bf16")
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def layer(inputs=24, outputs=40, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias)


@halves
def test_gelu_inside_the_product_is_more_exact():
    made, x = layer(200, 300), torch.randn(500, 200)
    wanted = F.gelu(F.linear(x.bfloat16().double(), made.weight.bfloat16().double(), made.bias.bfloat16().double()))
    with torch.inference_mode(), AUTOCAST:
        fused, apart = linear(x, made, gelu=True), F.gelu(made(x), approximate="tanh")
    assert (fused.double() - wanted).norm() <= (apart.double() - wanted).norm()


@pytest.fixture
def seen(monkeypatch):
    """The rows that oneDNN's kernel is called with."""
    rows, product = [], torch_private.linear_pointwise
    monkeypatch.setattr(torch_private, "linear_pointwise", lambda x, *rest: rows.append(x) or product(x, *rest))
    return rows


@halves
def test_the_kernel_sees_few_different_row_counts(seen):
    made = layer()
    with torch.inference_mode(), AUTOCAST:
        for count in range(2000, 2100):
            assert linear(torch.randn(count, 24), made).shape == (count, 40)
    assert len(seen) == 100
    assert len({len(rows) for rows in seen}) <= 3


def rows_in_memory(count):
    """Rows that `empty_rows` allocates: those that are asked for, and room behind them."""
    return empty_rows(count, 1, torch.int8, torch.device("cpu")).untyped_storage().nbytes()


@given(st.integers(1, 5_000_000))
def test_few_rows_are_added(count):
    room = rows_in_memory(count)
    assert count <= room <= max(count + 16, count * 1.04)
    assert room % 16 == 0
    assert rows_in_memory(room) == room


@halves
@given(
    count=st.integers(1, 400),
    start=st.integers(0, 50),
    behind=st.integers(0, 50),
    poison=st.sampled_from([float("nan"), float("inf"), 0.0]),
)
def test_added_rows_may_hold_anything(count, start, behind, poison):
    store = torch.full((start + count + behind, 24), poison, dtype=torch.bfloat16)
    rows = store[start : start + count]
    rows.copy_(torch.randn(count, 24))
    before, made = store.clone(), layer().bfloat16()
    with torch.inference_mode():
        out, apart = linear(rows, made), linear(rows.clone(), made)
    assert torch.equal(out, apart)
    assert torch.equal(store.nan_to_num(), before.nan_to_num())


@halves
def test_rows_with_room_are_not_copied(seen):
    made, rows = layer().bfloat16(), empty_rows(333, 24, torch.bfloat16, torch.device("cpu")).zero_()
    last = torch.zeros(333, 24, dtype=torch.bfloat16)
    with torch.inference_mode():
        for each in (rows, rows[:300], last):
            linear(each, made)
    assert [each.data_ptr() == rows.data_ptr() for each in seen] == [True, True, False]
    assert seen[2].data_ptr() != last.data_ptr()


@halves
def test_hooks_and_replaced_forwards_are_called():
    made, x, heard = layer(), torch.randn(300, 24), []
    hook = made.register_forward_hook(lambda *_: heard.append(True))
    with torch.inference_mode(), AUTOCAST:
        linear(x, made)
        hook.remove()
        linear(x, made)
        made.forward = lambda x: heard.append(True) or torch.nn.Linear.forward(made, x)
        linear(x, made)
    assert len(heard) == 2


@halves
def test_other_modules_are_called():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    made, x = Scaled(24, 40), torch.randn(300, 24)
    with torch.inference_mode(), AUTOCAST:
        assert torch.equal(linear(x, made), made(x))
        low_rank = torch.nn.Sequential(torch.nn.Linear(24, 2), torch.nn.Linear(2, 40))
        assert torch.equal(linear(x, low_rank), low_rank(x))
    halved = torch.nn.utils.parametrizations.weight_norm(layer())
    with torch.inference_mode(), AUTOCAST:
        assert torch.equal(linear(x, halved), halved(x))


@halves
def test_flops_are_counted():
    made, x = layer(), torch.randn(300, 24)
    with torch.inference_mode(), AUTOCAST, FlopCounterMode(display=False) as counter:
        linear(x, made, gelu=True)
    assert counter.get_total_flops() == 2 * 300 * 24 * 40


@halves
def test_hooks_of_all_modules_are_called():
    made, x, heard = layer(), torch.randn(300, 24), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: heard.append(True))
    try:
        with torch.inference_mode(), AUTOCAST:
            linear(x, made)
    finally:
        handle.remove()
    assert heard == [True]


@halves
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_strided_and_meta_parameters(which, seen):
    """The kernel would read past a strided bias, and read a meta weight, which has no data."""
    made = layer().bfloat16()
    spread = torch.randn(*getattr(made, which).shape, 2).bfloat16()[..., 0]
    setattr(made, which, torch.nn.Parameter(spread))
    x = torch.randn(300, 24).bfloat16()
    with torch.inference_mode():
        assert torch.equal(linear(x, made), made(x))
        setattr(made, which, torch.nn.Parameter(torch.empty(spread.shape, dtype=torch.bfloat16, device="meta")))
        with suppress(RuntimeError):  # of the layer itself
            linear(x, made)
        assert not seen
        linear(x, layer().bfloat16())
        assert len(seen) == 1


@halves
def test_a_wrong_width_raises_the_error_of_the_layer():
    with torch.inference_mode(), AUTOCAST, pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(300, 23), layer())


@halves
@pytest.mark.parametrize("which", ["weight", "bias", "rows"])
def test_mixed_types_raise_the_error_of_the_layer(which):
    made, x = layer().bfloat16(), torch.randn(300, 24).bfloat16()
    if which == "rows":
        x = x.float()
    else:
        setattr(made, which, torch.nn.Parameter(getattr(made, which).float()))
    with torch.inference_mode():
        for call in (made, lambda rows: linear(rows, made)):
            with pytest.raises(RuntimeError):
                call(x)


@halves
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("counting", [True, False])
def test_checkpoints_may_be_counted(counting, gelu):
    """The counter's hooks exist while the checkpoint is computed, and no longer when it is recomputed."""
    made, x = layer(outputs=400), torch.randn(300, 24, requires_grad=True)
    with AUTOCAST, FlopCounterMode(display=False) if counting else torch.enable_grad() as counter:
        out = torch.utils.checkpoint.checkpoint(linear, x, made, gelu, use_reentrant=False)
    out.float().sum().backward()
    found, x.grad = x.grad, None
    with AUTOCAST:
        linear(x, made, gelu).float().sum().backward()
    torch.testing.assert_close(found, x.grad)
    if counting:
        assert counter.get_total_flops() == 2 * 300 * 24 * 400


@halves
def test_weights_are_cast_once_in_their_context():
    made, x = layer(), torch.randn(300, 24)
    with torch.inference_mode(), AUTOCAST:
        with weights_cast_once():
            before = linear(x, made)
            kept = kept_casts()
            assert len(kept) == 2
            with weights_cast_once():
                assert not kept_casts()
            assert torch.equal(linear(x, made), before)
            assert len(kept) == 2
        assert kept_casts() is None
    with torch.no_grad():
        made.weight.zero_()
        made.bias.zero_()
    with torch.inference_mode(), AUTOCAST:
        assert not linear(x, made).any()


def test_it_compiles():
    made, x = layer(), torch.randn(30, 24)
    with torch.inference_mode(), AUTOCAST:
        out = torch.compile(lambda x: linear(x, made, gelu=True), backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(out, F.gelu(made(x), approximate="tanh"))
