"""Layers that compute in the type of their input."""

import pytest
import torch
import torch.nn.functional as F

from tokdyn.methods.layers import Conv2d, GroupNorm, Linear

TYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("inputs", TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_results_have_the_type_of_the_input_and_are_computed_in_it(weights, inputs, bias):
    x, image = torch.randn(3, 8).to(inputs), torch.randn(2, 8, 4, 5).to(inputs)
    linear, conv, norm = Linear(8, 4, bias=bias), Conv2d(8, 4, 3, padding=1, bias=bias), GroupNorm(2, 8, affine=bias)
    for layer in (linear, conv, norm):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        layer.to(weights)

    def own(value):
        return None if value is None else value.to(inputs)

    assert torch.equal(linear(x), F.linear(x, own(linear.weight), own(linear.bias)))
    assert torch.equal(conv(image), F.conv2d(image, own(conv.weight), own(conv.bias), padding=1))
    torch.testing.assert_close(
        norm(image).double(),
        F.group_norm(image.double(), 2, *(None if p is None else p.double() for p in (norm.weight, norm.bias))),
        rtol=0.05 if torch.bfloat16 in (weights, inputs) else 1e-4,
        atol=0.1 if torch.bfloat16 in (weights, inputs) else 1e-4,
    )
    assert norm(image).dtype == inputs


def test_the_epsilon_of_a_norm_counts():
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    norm = GroupNorm(1, 2, eps=2.0).double()
    torch.testing.assert_close(norm(x), (x - x.mean()) / (x.var(unbiased=False) + 2.0).sqrt())


def test_a_group_of_a_single_value_becomes_the_bias():
    norm = GroupNorm(2, 2)
    torch.nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 2)), norm.bias[None])
