"""Attention of packed tokens: every path equals a loop over the samples, with gradients."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.models.blocks import DiTBlock
from tokdyn.ops import attention
from tokdyn.ops.cpu.attention import choose


def packing_of(lengths):
    keep = torch.zeros(len(lengths), max(lengths) + 2, dtype=torch.bool)
    for row, length in zip(keep, lengths, strict=True):
        row[torch.randperm(len(row))[:length]] = True
    return ops.pack(keep, (keep.shape[1],))


def loop(qkv, heads, lengths):
    out = []
    for part in qkv.split(lengths):
        q, k, v = part.view(len(part), 3, heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        out.append((scores.softmax(-1) @ v).transpose(0, 1).reshape(len(part), -1))
    return torch.cat(out)


ragged = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(ragged, st.sampled_from(["auto", "split", "padded"]), st.booleans(), st.sampled_from([nullcontext, ops.plain]))
def test_every_path_equals_the_loop(lengths, backend, grad, form):
    torch.manual_seed(0)
    packing = packing_of(lengths)
    qkv = torch.randn(sum(lengths), 3 * 8, dtype=torch.float64, requires_grad=grad)
    with ops.attention_backend(backend), torch.set_grad_enabled(grad), form():
        out = ops.packed_attention(qkv, 2, packing)
    expected = loop(qkv, 2, lengths)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if grad:
        mine, theirs = (torch.autograd.grad(x.square().sum(), qkv, retain_graph=True)[0] for x in (out, expected))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_strided_rows():
    lengths = [20, 17, 30]
    qkv = torch.randn(3 * 16, sum(lengths), dtype=torch.float64).t()
    with ops.attention_backend("split"):
        out = ops.packed_attention(qkv, 2, packing_of(lengths))
    torch.testing.assert_close(out, loop(qkv, 2, lengths), rtol=0, atol=1e-12)


def test_long_rows_equal_the_loop():
    """They are above the thresholds from which the fused kernel runs."""
    lengths = [200, 170, 300]
    packing = packing_of(lengths)
    qkv = torch.randn(sum(lengths), 3 * 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ops.packed_attention(qkv, 2, packing), loop(qkv, 2, lengths), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "split", "padded"])
def test_masked_keys_of_zeros_in_bf16_change_nothing(backend):
    lengths = [16, 250, 7]
    qkv = torch.randn(sum(lengths), 3 * 16).bfloat16()
    with ops.attention_backend(backend), torch.no_grad():
        out = ops.packed_attention(qkv, 2, packing_of(lengths))
    torch.testing.assert_close(out.float(), loop(qkv.float(), 2, lengths), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("lengths", "dtype", "path"),
    [
        ([60, 64, 70], torch.float32, "padded"),  # calls cost more than some empty rows
        ([250, 260, 270], torch.float32, "split"),
        ([250, 260, 270], torch.bfloat16, "padded"),
        ([20, 30, 500], torch.bfloat16, "split"),  # two samples would be padding almost entirely
    ],
)
def test_samples_are_padded_if_that_costs_less_than_calls(lengths, dtype, path):
    assert choose(lengths, dtype) == path
    with ops.attention_backend(path):
        forced = attention.computed_pairs(lengths, torch.device("cpu"), dtype, 8)
    assert attention.computed_pairs(lengths, torch.device("cpu"), dtype, 8) == forced


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.sampled_from([1, 2, 3]))
def test_padded_training_in_bf16_equals_the_loop_up_to_rounding(lengths, heads):
    torch.manual_seed(0)
    packing = packing_of(lengths)
    qkv = torch.randn(sum(lengths), 3 * 8 * heads).bfloat16().requires_grad_()
    with ops.attention_backend("padded"):
        out = ops.packed_attention(qkv, heads, packing)
    weight = torch.randn(out.shape)
    (found,) = torch.autograd.grad(out, qkv, weight.bfloat16())
    source = qkv.detach().double().requires_grad_()
    expected = loop(source, heads, lengths)
    (slope,) = torch.autograd.grad(expected, source, weight.bfloat16().double())
    for mine, theirs in ((out, expected), (found, slope)):
        for part, reference in zip(mine.split(lengths), theirs.split(lengths), strict=True):
            near = 0.04 * reference.abs().max().item()
            torch.testing.assert_close(part.double(), reference, rtol=0.04, atol=near + 1e-3)


def test_training_in_bf16_on_very_different_lengths_computes_in_fp32():
    """Results and gradients are those of fp32, rounded to bf16."""
    cpu, lengths = torch.device("cpu"), [40] * 60 + [200] * 4
    assert choose(lengths, torch.bfloat16, learning=True) == "split"
    assert choose([250, 260, 270], torch.bfloat16, learning=True) == "padded"
    assert choose([510, 520, 530], torch.bfloat16, learning=True) == "split"  # too long for two products
    assert attention.computed_pairs(lengths, cpu, torch.bfloat16, 8, learning=True) == sum(n * n for n in lengths)
    qkv = torch.randn(sum(lengths), 3 * 16).bfloat16().requires_grad_()
    out = ops.packed_attention(qkv, 2, packing_of(lengths))
    weight = torch.randn(out.shape).bfloat16()
    (found,) = torch.autograd.grad((out * weight).sum(), qkv)
    assert out.dtype == found.dtype == torch.bfloat16
    source = qkv.detach().float().requires_grad_()
    expected = ops.packed_attention(source, 2, packing_of(lengths))
    (slope,) = torch.autograd.grad((expected * weight.float()).sum(), source)
    torch.testing.assert_close(out, expected.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(found, slope.bfloat16(), rtol=0, atol=0)


ELSEWHERE = torch.device("meta")  # stands for a device without the variable-length kernel, where samples are padded


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.booleans())
def test_pairs_are_counted_as_each_path_computes_them(lengths, biased):
    alone = sum(n * n for n in lengths)
    padded = alone if len(set(lengths)) == 1 else len(lengths) * (-(-max(lengths) // 16) * 16) ** 2

    def count(device):
        return attention.computed_pairs(lengths, device, torch.float32, 8, biased=biased)

    for device in (torch.device("cpu"), ELSEWHERE):
        with ops.plain():
            assert count(device) == (alone if device.type == "cpu" else padded)
            for backend, pairs in (("split", alone), ("padded", padded), ("varlen", alone)):
                with ops.attention_backend(backend):
                    assert count(device) == pairs


def test_plain_attention_computes_samples_apart_on_the_cpu():
    """Neither padding nor a mask: the fused kernel sees as many rows as there are, once for each sample."""
    lengths, seen = [3, 5, 2], []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append(args[0].shape[-2])
            return func(*args, **(kwargs or {}))

    with ops.plain(), Watch():
        ops.packed_attention(torch.randn(10, 24), 2, packing_of(lengths))
        ops.packed_attention(torch.randn(9, 24), 2, packing_of([3, 3, 3]))
    assert seen == [*lengths, 3]


def test_the_backend_is_forced_within_its_context_alone():
    assert attention.forced_backend() == "auto"
    with ops.attention_backend("split"):
        with ops.attention_backend("padded"):
            assert attention.forced_backend() == "padded"
        with pytest.raises(ZeroDivisionError), ops.attention_backend("padded"):
            raise ZeroDivisionError
        assert attention.forced_backend() == "split"
    assert attention.forced_backend() == "auto"


def test_widths_of_the_variable_length_kernel(monkeypatch):
    """It takes 384 / 6 and 1152 / 16; 60 / 5 = 12 is not a multiple of 8, and 512 / 1 is too wide."""

    def takes(dtype, width, capability):
        """The kernel computes no pairs of padding."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        rows = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)  # there may be no such device
        return attention.pairs_of(rows, [3, 5], width, False, False) == 3 * 3 + 5 * 5

    assert all(takes(torch.bfloat16, width, (9, 0)) for width in (64, 72, 8, 256))
    assert not any(takes(torch.bfloat16, width, (9, 0)) for width in (12, 512))
    assert not takes(torch.float32, 64, (9, 0))
    assert not takes(torch.float16, 64, (7, 5))


def test_an_unknown_backend_raises():
    with pytest.raises(InputError, match=r"'flash'.*auto, split, padded, varlen"):
        ops.attention_backend("flash").__enter__()


@settings(deadline=None, max_examples=20)
@given(ragged)
def test_pack_and_unpack(lengths):
    packing = packing_of(lengths)
    count, cells = len(lengths), packing.grid[0]
    dense = torch.arange(1.0, count * cells * 2 + 1).view(count, cells, 2)
    rows = dense.flatten(0, 1).index_select(0, packing.index)
    back = ops.unpack(rows, packing)
    kept = back.abs().sum(-1) > 0
    assert kept.sum(1).tolist() == lengths
    assert torch.equal(back[kept], dense[kept])
    assert torch.equal(packing.sample * cells + packing.cell, packing.index)
    assert packing.cu_seqlens.diff().tolist() == lengths


@pytest.mark.parametrize("lengths", [[3, 5, 2], [4, 4, 4], [200, 230]])
@pytest.mark.parametrize("grad", [False, True])
def test_a_block_on_packed_rows_equals_the_block_on_each_sample(lengths, grad):
    torch.manual_seed(1)
    block = DiTBlock(24, 3, 4.0).double()
    torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.3)
    packing = packing_of(lengths)
    rows = torch.randn(sum(lengths), 24, dtype=torch.float64)
    condition = torch.randn(len(lengths), 24, dtype=torch.float64)
    before = rows.clone()
    with torch.set_grad_enabled(grad):
        packed = block(rows, condition, packing)
        alone = [block(part[None], condition[b : b + 1])[0] for b, part in enumerate(rows.split(lengths))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-12)
    assert torch.equal(rows, before)
