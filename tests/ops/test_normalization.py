"""RMSNorm by rows: PyTorch's values and gradients, whatever the shape and layout."""

import pytest
import torch
import torch.nn.functional as F

from tokdyn.ops.normalization import group_norm_silu, rms_norm


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_group_norm_and_silu_are_those_of_pytorch(layout, dtype, frozen, turned):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 12).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.requires_grad_(not frozen)
    given = torch.randn(3, 12, 5, 6).to(dtype).contiguous(memory_format=layout)
    upper = torch.randn(3, 12, 5, 6).to(dtype)  # contiguous, whatever the layout of the maps
    if turned:
        given, upper = given.transpose(2, 3), upper.transpose(2, 3)
    outcomes = []
    for function in (group_norm_silu, lambda x, norm: F.silu(norm(x))):
        x = given.clone(memory_format=torch.preserve_format).requires_grad_()
        out = function(x, norm)
        outcomes.append([out, *torch.autograd.grad(out, [x] + ([] if frozen else [*norm.parameters()]), upper)])
        with torch.no_grad():
            assert torch.equal(function(given, norm), out)
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_hooks_of_the_norm_are_heard():
    norm, heard = torch.nn.GroupNorm(2, 4), []
    norm.register_forward_hook(lambda *_: heard.append(True))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    torch.testing.assert_close(group_norm_silu(x, norm), F.silu(norm(x)))
    assert len(heard) == 2
