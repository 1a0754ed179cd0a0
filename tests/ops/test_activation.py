"""GELU one cacheful at a time: parts of any size, the ends of the range, and memory that is written over."""

import pytest
import torch
import torch.nn.functional as F

from tokdyn.ops.cpu.activation import gelu
from tokdyn.ops.layers import gelu_tanh


@pytest.mark.parametrize("shape", [(3,), (70, 1000), (5, 7, 2001), (0, 4), (torch.get_num_threads(), 300_001)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 6e-6), (torch.float64, 1e-13), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_exact_for_any_size_of_parts(shape, dtype, near):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    upper = torch.randn(shape).to(dtype)
    leaf, reference = x.clone().requires_grad_(), x.double().requires_grad_()
    out, exact = gelu_tanh(leaf), F.gelu(reference, approximate="tanh")
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)
    torch.testing.assert_close(gelu_tanh(x).double(), exact.detach(), rtol=near, atol=near)
    out.backward(upper)
    exact.backward(upper.double())
    torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=near, atol=near)


def test_the_ends_of_the_range():
    x = torch.cat([torch.tensor([-1e4, -30.0, -0.0, 0.0, 30.0, 1e4]), torch.zeros(1 << 16)]).requires_grad_()
    out = gelu_tanh(x)
    assert out[:6].tolist() == [0.0, 0.0, 0.0, 0.0, 30.0, 1e4]
    out.sum().backward()
    assert x.grad[:6].tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_overwriting_the_input_changes_no_result(dtype):
    layer, x = torch.nn.Linear(40, 400).to(dtype), torch.randn(300, 40).to(dtype)
    with torch.no_grad():
        assert torch.equal(gelu(layer(x), overwrite=True), gelu(layer(x), overwrite=False))
    kept, over = (
        torch.autograd.grad(gelu(layer(x), overwrite, x, layer).sum(), layer.weight)[0] for overwrite in (False, True)
    )
    assert torch.equal(kept, over)
