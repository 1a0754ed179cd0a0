"""The layers of our own models are their formulas, in plain PyTorch and in their CPU forms."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tokdyn import ops
from tokdyn.ops import layers

FORMS = pytest.mark.parametrize("form", [nullcontext, ops.plain], ids=["forms", "plain"])
KEEP = torch.tensor([[True, False, True, True], [False, True, False, False]])


def exact(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def normed(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@FORMS
@pytest.mark.parametrize("eps", [None, 0.1])
def test_modulation_scales_and_shifts_each_sample_after_the_norm(form, eps):
    x, shift, scale = exact(2, 3, 8), exact(2, 8), exact(2, 8)
    with form():
        found = layers.modulated_norm(x, shift, scale, **({} if eps is None else {"eps": eps}))
    expected = normed(x, 1e-6 if eps is None else eps) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@FORMS
def test_packed_rows_are_modulated_as_their_sample_is(form):
    packing = ops.pack(KEEP, (4,))
    x, shift, scale, gate, y = exact(4, 8), exact(2, 8), exact(2, 8), exact(2, 8), exact(4, 8)
    own = [0, 0, 0, 1]
    with form():
        found = layers.modulated_norm(x, shift, scale, packing)
        added = layers.gated_add(x, gate, y, packing)
    torch.testing.assert_close(found, normed(x, 1e-6) * (1 + scale[own]) + shift[own], rtol=0, atol=1e-12)
    torch.testing.assert_close(added, x + gate[own] * y, rtol=0, atol=1e-12)


@FORMS
def test_a_gated_residual_is_added_in_the_type_of_the_stream(form):
    x, gate, y = exact(2, 3, 8), exact(2, 8), exact(2, 3, 8)
    with form():
        torch.testing.assert_close(layers.gated_add(x, gate, y), x + gate[:, None] * y, rtol=0, atol=1e-12)
        half = layers.gated_add(x.float(), gate.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32
    wanted = x.float() + gate.bfloat16().float()[:, None] * y.bfloat16().float()
    torch.testing.assert_close(half, wanted, rtol=0, atol=1e-5)


@FORMS
def test_modulation_keeps_the_type_of_half_precision_rows(form):
    x, shift, scale = exact(2, 3, 8), exact(2, 8), exact(2, 8)
    with form(), torch.no_grad():
        found = layers.modulated_norm(x.bfloat16(), shift.float(), scale.float())
    assert found.dtype == torch.bfloat16
    expected = normed(x, 1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)  # bf16 has 8 bits


@FORMS
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_divides_by_the_root_of_the_mean_square(form, eps):
    x, weight = exact(3, 5), exact(5)
    with form():
        found = layers.rms_norm(x, weight, eps)
        mixed = layers.rms_norm(x.bfloat16(), weight.float(), eps)
    torch.testing.assert_close(found, x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight, rtol=0, atol=1e-12)
    assert mixed.dtype == torch.float32


@FORMS
def test_gelu_is_its_tanh_form(form):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()]
    layer = nn.Linear(97, 3).double()
    with form():
        assert layers.gelu_tanh(x).tolist() == pytest.approx(expected, abs=1e-12)
        inside = layers.linear(x, layer, gelu=True)
        alone = layers.linear(x, layer)
    torch.testing.assert_close(alone, layer.weight @ x + layer.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(inside, layers.gelu_tanh(alone), rtol=0, atol=1e-12)


@FORMS
def test_group_norm_comes_before_silu(form):
    x, norm = exact(2, 6, 3, 4), nn.GroupNorm(3, 6, eps=0.1).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with form():
        found = layers.group_norm_silu(x, norm)
    y = normed(x.reshape(2, 3, -1), 0.1).view_as(x) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(found, y / (1 + (-y).exp()), rtol=0, atol=1e-12)


def test_casts_of_weights_end_with_their_context():
    assert layers.kept_casts() is None
    with layers.weights_cast_once():
        assert layers.kept_casts() == {}
    with pytest.raises(ZeroDivisionError), layers.weights_cast_once():
        raise ZeroDivisionError
    assert layers.kept_casts() is None
