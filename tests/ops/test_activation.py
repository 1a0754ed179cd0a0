"""GELU part by part: the same function and derivative as PyTorch's, whatever the type, shape and layout."""

import pytest
import torch
import torch.nn.functional as F

from tokdyn.ops import activation
from tokdyn.ops.activation import gelu_tanh

SHAPES = [(3,), (70, 1000), (5, 7, 2001), (0, 4)]


@pytest.mark.parametrize("part", [1000, 1 << 17])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 6e-6), (torch.float64, 1e-13), (torch.bfloat16, 1e-2)])
def test_value_and_gradient_are_those_of_pytorch(shape, dtype, near, part, monkeypatch):
    monkeypatch.setattr(activation, "_PART", part)
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    upper = torch.randn(shape).to(dtype)
    found, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
    out, exact = gelu_tanh(found), F.gelu(wanted, approximate="tanh")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)
    torch.testing.assert_close(gelu_tanh(x).double(), exact.detach(), rtol=near, atol=near)
    out.backward(upper)
    exact.backward(upper.double())
    torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=near, atol=near)


def test_rows_that_do_not_lie_together():
    x = torch.randn(400, 300).t().requires_grad_()
    torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)
    mine, theirs = (torch.autograd.grad(f(x).sum(), x)[0] for f in (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")))
    torch.testing.assert_close(mine, theirs, rtol=6e-6, atol=6e-6)


def test_transforms_of_functions_go_through():
    x = torch.randn(300, 300)
    mine, theirs = (torch.func.grad(lambda x, f=f: f(x).sum())(x) for f in (gelu_tanh, _plain))
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.func.vmap(gelu_tanh)(x.expand(2, -1, -1)), _plain(x).expand(2, -1, -1))


def _plain(x):
    return F.gelu(x, approximate="tanh")


def test_the_ends_of_the_range():
    x = torch.cat([torch.tensor([-1e4, -30.0, -0.0, 0.0, 30.0, 1e4]), torch.zeros(1 << 16)]).requires_grad_()
    out = gelu_tanh(x)
    assert out[:6].tolist() == [0.0, 0.0, 0.0, 0.0, 30.0, 1e4]
    out.sum().backward()
    assert x.grad[:6].tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


def test_what_came_in_stays():
    x = torch.randn(300, 400)
    before = x.clone()
    gelu_tanh(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_written_over_what_came_in_it_is_the_same(dtype):
    x = torch.randn(300, 400).to(dtype)
    assert torch.equal(gelu_tanh(x.clone(), over=True), gelu_tanh(x))
    leaf = x.requires_grad_()
    kept, over = (torch.autograd.grad(gelu_tanh(2 * leaf, over=given).sum(), leaf)[0] for given in (False, True))
    assert torch.equal(kept, over)
