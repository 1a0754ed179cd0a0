"""RMSNorm by rows: PyTorch's values and gradients, whatever the shape and layout."""

import pytest
import torch
import torch.nn.functional as F

from tokdyn.ops.normalization import rms_norm


@pytest.mark.parametrize("shape", [(1, 3), (2, 700, 24), (3, 5, 7, 8), (0, 6)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("weights", [None, torch.float32])
def test_value_and_gradients_are_those_of_pytorch(shape, dtype, near, weights):
    torch.manual_seed(0)
    given = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weights or dtype)
    dtype = torch.promote_types(dtype, weights or dtype)
    near = 2e-5 if dtype == torch.float32 else near
    upper = torch.randn(shape).to(dtype)
    found = [t.clone().requires_grad_() for t in given]
    wanted = [t.double().requires_grad_() for t in given]
    out, exact = rms_norm(*found, 1e-5), F.rms_norm(wanted[0], shape[-1:], wanted[1], 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=near, atol=near)
    out.backward(upper)
    exact.backward(upper.double())
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad.dtype == mine.dtype
        rounding = torch.finfo(mine.dtype).eps
        scale = max([1.0, *theirs.grad.abs().flatten().tolist()])
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=near + rounding, atol=near * scale)


def test_its_derivative_is_right():
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (5,))]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), given)


def test_rows_that_do_not_lie_together_and_zeros():
    x = torch.randn(6, 4, 8).permute(1, 2, 0)
    weight = torch.ones(6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (6,), weight, 1e-5))
    assert torch.equal(rms_norm(torch.zeros(2, 6), weight, 1e-5), torch.zeros(2, 6))
