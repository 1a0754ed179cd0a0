"""Size-weighted attention: a key of size s counts like s equal keys, on every path and with every mask."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.ops.weighting import KeyBias, size_bias, size_weighted_attention

SIZES = torch.tensor([[1, 3, 2, 1, 5], [2, 1, 1, 4, 4]])  # both samples stand for 12 tokens


def repeated(x, dim=2):
    """Repeat keys or values by their sizes, as if none had been merged."""
    return torch.stack([row.repeat_interleave(size, dim=dim - 1) for row, size in zip(x, SIZES, strict=True)])


def heads(*shape):
    return torch.randn(2, 3, *shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_sizes_count_like_repetitions(kind):
    query, key, value = heads(4, 8), heads(5, 8), heads(5, 8)
    mask = {"none": None, "bool": torch.rand(2, 1, 4, 5) < 0.7, "additive": torch.randn(2, 1, 1, 5).double()}[kind]
    if kind == "bool":
        mask[..., 0] = True  # every query has to see a key
    whole = None if mask is None else repeated(mask.expand(2, 3, 4, 5), dim=4 - 1)
    expected = F.scaled_dot_product_attention(query, repeated(key), repeated(value), attn_mask=whole)
    found = size_weighted_attention(query, key, value, SIZES.double(), mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("image", ["first", "last"])
def test_text_tokens_have_size_one(image):
    bias = size_bias(SIZES.double(), 2, image)
    ones, sizes = torch.ones(2, 2).double(), SIZES.double()
    assert torch.equal(bias.exp().round(), torch.cat([sizes, ones] if image == "first" else [ones, sizes], dim=1))


def test_a_bias_is_added_in_code_that_takes_none():
    """Only in self-attention of the same batch and number of tokens that is not causal."""
    query, key, value = heads(5, 8), heads(5, 8), heads(5, 8)
    mode = KeyBias(SIZES.double().log())
    with mode:
        found = F.scaled_dot_product_attention(query, key, value=value)
        others = [
            F.scaled_dot_product_attention(query[:, :, :4], key, value),
            F.scaled_dot_product_attention(query[:1], key[:1], value[:1]),
            F.scaled_dot_product_attention(query, key, value, is_causal=True),
            torch.softmax(query @ key.mT, -1) @ value,
        ]
    assert mode.calls == 1
    torch.testing.assert_close(found, size_weighted_attention(query, key, value, SIZES.double()), rtol=0, atol=0)
    plain = [
        F.scaled_dot_product_attention(query[:, :, :4], key, value),
        F.scaled_dot_product_attention(query[:1], key[:1], value[:1]),
        F.scaled_dot_product_attention(query, key, value, is_causal=True),
        torch.softmax(query @ key.mT, -1) @ value,
    ]
    assert all(torch.equal(one, other) for one, other in zip(others, plain, strict=True))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_bias_is_added_to_the_mask_and_other_arguments_stay(by_name):
    query, key, value = heads(5, 8), heads(5, 8), heads(5, 8)
    mask = torch.randn(2, 1, 5, 5, dtype=torch.float64)
    with KeyBias(SIZES.double().log()) as mode:
        if by_name:
            found = F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask, scale=0.1)
        else:
            found = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.1)
    assert mode.met
    logits = query @ key.mT * 0.1 + mask + SIZES.double().log()[:, None, None]
    torch.testing.assert_close(found, logits.softmax(-1) @ value, rtol=0, atol=1e-12)


def test_a_bias_meets_only_attention_of_its_own_rows():
    query, key = heads(5, 8), heads(5, 8)
    with KeyBias(torch.randn(2, 4)) as mode:
        F.scaled_dot_product_attention(query, key, key)
        F.scaled_dot_product_attention(query[:, :, :4], key, key)
        F.scaled_dot_product_attention(query[:, 0], key[:, 0], key[:, 0])
    assert not mode.met
    with KeyBias(torch.randn(2, 5)) as mode:
        F.scaled_dot_product_attention(query[:, 0], key[:, 0], key[:, 0])  # no axis of heads
        F.scaled_dot_product_attention(query, key[:, :, :4], key[:, :, :4])
    assert not mode.met


def test_masks_of_another_type_take_that_of_the_query():
    query = torch.randn(2, 1, 5, 8)
    found = size_weighted_attention(query, query, query, SIZES, torch.randn(2, 1, 1, 5).double())
    assert found.dtype == query.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_dense_attention_takes_a_bias(dtype, grad):
    """In bf16, keys are padded and training takes two matrix products."""
    qkv = torch.randn(2, 5, 24, dtype=torch.float64)
    whole = torch.stack([row.repeat_interleave(size, dim=0) for row, size in zip(qkv, SIZES, strict=True)])
    expected = ops.dense_attention(whole, 2)
    first = torch.cat([torch.zeros(2, 1, dtype=torch.int64), SIZES.cumsum(1)[:, :-1]], dim=1)
    expected = expected.gather(1, first[..., None].expand(-1, -1, 8))
    with torch.set_grad_enabled(grad):
        found = ops.dense_attention(qkv.to(dtype).requires_grad_(grad), 2, SIZES.double().log())
    tolerance = 1e-12 if dtype == torch.float64 else 0.03  # bf16 has 8 bits: a few times 2^-8 of values up to 3
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", ["auto", "split", "padded"])
@pytest.mark.parametrize("lengths", [(4, 7, 2), (5, 5)])
@pytest.mark.parametrize("form", [nullcontext, ops.plain], ids=["forms", "plain"])
def test_packed_attention_takes_a_bias(backend, lengths, form):
    keep = torch.arange(8) < torch.tensor(lengths)[:, None]
    packing = ops.pack(keep, (8,))
    qkv = torch.randn(packing.total, 24, dtype=torch.float64)
    size = torch.randint(1, 5, (packing.total,))
    with ops.attention_backend(backend), form():
        found = ops.packed_attention(qkv, 2, packing, size.double().log())
    parts = zip(qkv.split(lengths), size.split(lengths), strict=True)
    expected = torch.cat([ops.dense_attention(rows[None], 2, own.double().log()[None])[0] for rows, own in parts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_variable_length_path_refuses_a_bias():
    packing = ops.pack(torch.arange(4) < torch.tensor([[3], [4]]), (4,))
    with ops.attention_backend("varlen"), pytest.raises(InputError, match="bias"):
        ops.packed_attention(torch.randn(7, 24), 2, packing, torch.zeros(7))
