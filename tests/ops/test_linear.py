"""Linear layers on CPU: what the layer itself computes, in every type, with gradients, whoever is watching."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tokdyn.ops import linear as subject
from tokdyn.ops.device import _CPU_HALVES
from tokdyn.ops.linear import empty_rows, linear, weights_cast_once

halves = pytest.mark.skipif(not _CPU_HALVES[torch.bfloat16], reason="the processor has no instructions for bf16")
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def layer(inputs=24, outputs=40, bias=True):
    torch.manual_seed(0)
    return torch.nn.Linear(inputs, outputs, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "fp64", "bf16", "autocast", "autocast of bf16", "autocast of fp64"])
@pytest.mark.parametrize("shape", [(1, 24), (3, 70, 24), (333, 24), (0, 24)])
def test_it_is_the_layer_without_gradients(shape, kind, gelu, bias):
    made, x = layer(bias=bias), torch.randn(shape)
    wide = made.to(torch.float64)(x.double())
    wide = F.gelu(wide, approximate="tanh") if gelu else wide
    types = {"fp64": torch.float64, "autocast of fp64": torch.float64, "bf16": torch.bfloat16}
    made, dtype = made.float(), types.get(kind, torch.float32)
    made.to(dtype)
    given = x.to(torch.bfloat16 if kind == "autocast of bf16" else dtype)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
        out, plain = linear(given, made, gelu), made(given)
    assert out.shape == plain.shape
    assert out.dtype == plain.dtype
    near = {torch.float64: 1e-12, torch.float32: 1e-5}.get(out.dtype, 0.02)
    torch.testing.assert_close(out.double(), wide, rtol=near, atol=near)


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "x"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("shape", [(3, 70, 24), (333, 24)])
def test_its_gradients_are_those_of_the_layer(shape, kind, frozen):
    made = layer()
    made.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    x = torch.randn(shape).to(made.weight.dtype)
    upper = torch.randn(*shape[:-1], 40).to(made.weight.dtype)
    outcomes = []
    for function in (lambda x: linear(x, made), made):
        made.requires_grad_(True)
        if frozen in ("weight", "bias"):
            getattr(made, frozen).requires_grad_(False)
        tracked = x.clone().requires_grad_(frozen != "x")
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            out = function(tracked)
        wanted = [each for each in (tracked, made.weight, made.bias) if each.requires_grad]
        outcomes.append([out, *torch.autograd.grad(out, wanted, upper.to(out.dtype))])
    for mine, theirs in zip(*outcomes, strict=True):
        near = 1e-5 if kind == "fp32" else 0.02
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near * theirs.abs().max().item())


@halves
def test_a_network_learns_the_same_through_it():
    made = [layer(24, 40), layer(40, 24)]
    x = torch.randn(200, 24)
    slopes = []
    for function in (linear, lambda x, each, gelu=False: F.gelu(each(x), approximate="tanh") if gelu else each(x)):
        with AUTOCAST:
            out = function(function(x, made[0], gelu=True), made[1])
        slopes.append(torch.autograd.grad(out.float().square().mean(), [p for each in made for p in each.parameters()]))
    for mine, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02 * theirs.abs().max().item())


@halves
def test_gelu_is_more_exact_than_after_rounding():
    made, x = layer(200, 300), torch.randn(500, 200)
    wanted = F.gelu(F.linear(x.bfloat16().double(), made.weight.bfloat16().double(), made.bias.bfloat16().double()))
    with torch.inference_mode(), AUTOCAST:
        fused, apart = linear(x, made, gelu=True), F.gelu(made(x), approximate="tanh")
    assert (fused.double() - wanted).norm() <= (apart.double() - wanted).norm()


@halves
def test_the_kernel_is_what_runs_and_is_told_few_row_counts(monkeypatch):
    seen = []
    product = subject._product
    monkeypatch.setattr(subject, "_product", lambda x, *rest: seen.append(x.shape) or product(x, *rest))
    made = layer()
    with torch.inference_mode(), AUTOCAST:
        for count in range(2000, 2100):
            assert linear(torch.randn(count, 24), made).shape == (count, 40)
    assert len(seen) == 100
    assert len({rows for rows, _ in seen}) <= 3


@given(st.integers(1, 5_000_000))
def test_room_is_a_little_more_than_there_is(count):
    room = subject._room(count)
    assert count <= room <= max(count + 16, count * 1.04)
    assert room % 16 == 0
    assert subject._room(room) == room


@halves
@given(count=st.integers(1, 400), start=st.integers(0, 50), poison=st.sampled_from([float("nan"), float("inf"), 0.0]))
def test_what_lies_behind_the_rows_does_not_matter(count, start, poison):
    store = torch.full((500, 24), poison, dtype=torch.bfloat16)
    rows = store[start : start + count]
    rows.copy_(torch.randn(count, 24))
    before, made = store.clone(), layer().bfloat16()
    with torch.inference_mode():
        out, apart = linear(rows, made), linear(rows.clone(), made)
    assert torch.equal(out, apart)
    assert torch.equal(store.nan_to_num(), before.nan_to_num())


def test_rows_with_room_are_not_copied():
    rows = empty_rows(333, 24, torch.bfloat16, torch.device("cpu"))
    assert subject._with_room(rows, torch.bfloat16).data_ptr() == rows.data_ptr()
    assert subject._with_room(rows[:300], torch.bfloat16).data_ptr() == rows.data_ptr()
    last = torch.empty(333, 24, dtype=torch.bfloat16)
    assert subject._with_room(last, torch.bfloat16).data_ptr() != last.data_ptr()


@halves
def test_whoever_watches_the_layer_is_heard():
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
def test_layers_of_other_kinds_are_called():
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
def test_flops_are_counted_as_before():
    made, x = layer(), torch.randn(300, 24)
    with torch.inference_mode(), AUTOCAST, FlopCounterMode(display=False) as counter:
        linear(x, made, gelu=True)
    assert counter.get_total_flops() == 2 * 300 * 24 * 40


@halves
def test_hooks_for_all_modules_are_heard():
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
def test_parameters_of_any_layout_and_place(which):
    """The kernel would read past a bias with gaps, and take a weight without data for one with."""
    made = layer().bfloat16()
    spread = torch.randn(*getattr(made, which).shape, 2).bfloat16()[..., 0]
    setattr(made, which, torch.nn.Parameter(spread))
    x = torch.randn(300, 24).bfloat16()
    with torch.inference_mode():
        assert torch.equal(linear(x, made), made(x))
    assert subject._is_plain(x, layer(), False)
    setattr(made, which, torch.nn.Parameter(torch.empty(spread.shape, dtype=torch.bfloat16, device="meta")))
    assert not subject._is_plain(x, made, False)


@halves
def test_a_wrong_width_is_named_as_by_the_layer():
    with torch.inference_mode(), AUTOCAST, pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(300, 23), layer())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_second_derivatives_of_exact_types_are_there(kind):
    made, x = layer().to(kind), torch.randn(300, 24, dtype=kind, requires_grad=True)
    (slope,) = torch.autograd.grad(linear(x, made).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(slope.sum(), x)[0].any()


@halves
@pytest.mark.parametrize("counting", [True, False])
def test_checkpoints_may_be_counted(counting):
    made, x = layer(), torch.randn(300, 24, requires_grad=True)
    with AUTOCAST, FlopCounterMode(display=False) if counting else torch.enable_grad() as counter:
        out = torch.utils.checkpoint.checkpoint(linear, x, made, use_reentrant=False)
    out.float().sum().backward()
    assert x.grad is not None
    if counting:
        assert counter.get_total_flops() == 2 * 300 * 24 * 40


@halves
def test_weights_are_cast_once_where_that_was_asked_for():
    made, x = layer(), torch.randn(300, 24)
    with torch.inference_mode(), AUTOCAST:
        with weights_cast_once():
            before = linear(x, made)
            kept = subject._casts.get()
            assert len(kept) == 2
            with weights_cast_once():
                assert not subject._casts.get()
            assert torch.equal(linear(x, made), before)
            assert len(kept) == 2
        assert subject._casts.get() is None
    with torch.no_grad():
        made.weight.zero_()
        made.bias.zero_()
    with torch.inference_mode(), AUTOCAST:
        assert not linear(x, made).any()


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_of_functions_go_through(transform):
    made, x = layer(), torch.randn(2, 30, 24)
    if transform == "grad":
        mine, theirs = (torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (lambda x: linear(x, made), made))
    else:
        mine, theirs = torch.func.vmap(lambda x: linear(x, made))(x), made(x)
    torch.testing.assert_close(mine, theirs)


def test_it_compiles():
    made, x = layer(), torch.randn(30, 24)
    with torch.inference_mode(), AUTOCAST:
        out = torch.compile(lambda x: linear(x, made, gelu=True), backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(out, F.gelu(made(x), approximate="tanh"))
