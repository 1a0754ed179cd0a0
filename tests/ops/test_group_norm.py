"""GroupNorm with SiLU in half types: exact gradients of channels-last maps, autocast, frozen weights and hooks."""

import pytest
import torch
import torch.nn.functional as F

from tokdyn.ops.layers import group_norm_silu


def case(dtype, layout, weights=None, sizes=(5, 6)):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(4, 12).to(weights or dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    maps = 3 + torch.randn(5, 12, *sizes).to(dtype).contiguous(memory_format=layout)
    upper = torch.randn(5, 12, *sizes).to(dtype)  # contiguous, whatever the layout of the maps
    return norm, maps, upper


def gradients(function, x, norm, upper):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    learning = [x, *(each for each in norm.parameters() if each.requires_grad)]
    out = function(x, norm)
    return [out, *torch.autograd.grad(out, learning, upper)]


def plain(x, norm):
    return F.silu(norm(x))


@pytest.mark.parametrize("sizes", [(5, 6), (100, 100)], ids=["one part", "several parts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, torch.float32])
def test_gradients_of_channels_last_half_maps_are_exact_up_to_rounding(sizes, dtype, weights):
    norm, maps, upper = case(dtype, torch.channels_last, weights, sizes)
    mine = gradients(group_norm_silu, maps, norm, upper)
    wanted = gradients(plain, maps.double(), norm.double(), upper.double())
    assert not mine[0].grad_fn.name().endswith("0")  # as the names of PyTorch's own functions do
    assert mine[1].is_contiguous(memory_format=torch.channels_last)
    for ours, exact, kind in zip(mine, wanted, (dtype, dtype, *[weights or dtype] * 2), strict=True):
        assert ours.dtype == kind
        near = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), exact, rtol=near, atol=near * exact.abs().max().item())


def test_autocast_changes_nothing():
    norm, maps, upper = case(torch.bfloat16, torch.channels_last, torch.float32)
    alone = gradients(group_norm_silu, maps, norm, upper)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(group_norm_silu, maps, norm, upper)
    for one, other in zip(alone, inside, strict=True):
        assert torch.equal(one, other)


def test_an_empty_batch_has_zero_gradients():
    norm, maps, upper = case(torch.bfloat16, torch.channels_last)
    _, to_x, to_weight, _ = gradients(group_norm_silu, maps[:0], norm, upper[:0])
    assert len(to_x) == 0
    assert torch.equal(to_weight, torch.zeros_like(to_weight))


def test_hooks_of_the_norm_are_called():
    norm, heard = torch.nn.GroupNorm(2, 4), []
    norm.register_forward_hook(lambda *_: heard.append(True))
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    torch.testing.assert_close(group_norm_silu(x, norm), F.silu(norm(x)))
    assert len(heard) == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_norm_passes_gradients_on(layout):
    norm, maps, upper = case(torch.float32, layout)
    norm.requires_grad_(False)
    for mine, theirs in zip(*(gradients(f, maps, norm, upper) for f in (group_norm_silu, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
