"""A block on packed rows equals the block on each sample alone, in values and gradients; autocast and hooks."""

import pytest
import torch

from tokdyn import ops
from tokdyn.models import DCDiT, DiT
from tokdyn.models.blocks import DiTBlock
from tokdyn.ops import precision
from tokdyn.ops.layers import gated_add, modulated_norm
from tokdyn.tokens import Packing


def packed(counts, grid=(16, 32)) -> Packing:
    keep = torch.zeros(len(counts), grid[0] * grid[1], dtype=torch.bool)
    for row, count in zip(keep, counts, strict=True):
        row[torch.randperm(len(row))[:count]] = True
    return ops.pack(keep, grid)


@pytest.mark.parametrize("counts", [(5, 9, 1), (200, 301, 250), (40, 512, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_equal_those_of_single_samples(counts, dtype):
    torch.manual_seed(0)
    block, packing = DiTBlock(24, 3, 4.0).to(dtype), packed(counts)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rows = torch.randn(packing.total, 24, dtype=dtype)
    condition = torch.randn(len(counts), 24, dtype=dtype)
    upper = torch.randn_like(rows)

    def outcome(together):
        x, c = rows.clone().requires_grad_(), condition.clone().requires_grad_()
        if together:
            out = block(x, c, packing)
        else:
            parts = x.split_with_sizes(packing.lengths)
            out = torch.cat([block(part[None], each[None])[0] for part, each in zip(parts, c, strict=True)])
        return [out, *torch.autograd.grad(out, [x, c, *block.parameters()], upper)]

    near = 1e-10 if dtype == torch.float64 else 2e-4
    for found, wanted in zip(outcome(True), outcome(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=near, atol=near * wanted.abs().max().item())


@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
def test_the_derivative_of_the_modulated_norm(frozen):
    torch.manual_seed(0)
    packing = packed((200, 260))
    shapes = (packing.total, 3), (2, 3), (2, 3)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=at != frozen) for at, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda *each: modulated_norm(*each, packing), given, fast_mode=True)


@pytest.mark.parametrize("dense", [True, False])
def test_under_autocast_norms_write_and_gates_read_bf16(dense):
    torch.manual_seed(0)
    packing = None if dense else packed((200, 260))
    rows = (2, 230, 24) if dense else (packing.total, 24)
    x, y = torch.randn(rows), torch.randn(rows).bfloat16()
    shift, scale, gate = (torch.randn(2, 24) for _ in range(3))
    found = []
    for half in (True, False):
        leaves = [each.float().requires_grad_(not dense) for each in (x, y, shift, scale, gate)]
        a, b, *modulation = leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(not dense):
            normed = modulated_norm(a, *modulation[:2], packing)
            added = gated_add(a, modulation[2], b.bfloat16() if half else b, packing)
        assert normed.dtype == (torch.bfloat16 if half else torch.float32)
        assert added.dtype == torch.float32
        slopes = [] if dense else torch.autograd.grad(normed.float().square().sum() + added.square().sum(), leaves)
        found.append([normed.float(), added, *slopes])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_strided_rows_are_gated_and_normed_alike():
    torch.manual_seed(0)
    x, y = torch.randn(2, 24, 230).transpose(1, 2), torch.randn(2, 24, 230).bfloat16().transpose(1, 2)
    shift, scale, gate = (torch.randn(2, 24) for _ in range(3))
    with torch.inference_mode():
        torch.testing.assert_close(gated_add(x, gate, y, None), x + gate[:, None] * y)
        wanted = torch.nn.functional.layer_norm(x, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        torch.testing.assert_close(modulated_norm(x, shift, scale, None), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("build", ["dit", "dcdit"])
def test_autocast_computes_in_fp32_without_instructions_for_bf16(build, instructions, monkeypatch):
    monkeypatch.setitem(precision.CPU_HALVES, torch.bfloat16, instructions)
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = DiT(patch_size=2, **sizes) if build == "dit" else DCDiT(**sizes)
    with torch.no_grad():
        model.final_layer.linear.weight.normal_()
    x, steps, labels = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([0, 3])
    plain = model(x, steps, labels).sample
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x, steps, labels).sample, plain) is not instructions
        half = model(x.bfloat16(), steps, labels).sample
        assert half.dtype == (torch.bfloat16 if instructions else torch.float32)
    half.float().square().mean().backward()
    slopes = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x.bfloat16().float(), steps, labels).sample.square().mean().backward()
    near = 0.1 if instructions else 1e-5
    for mine, parameter in zip(slopes, model.parameters(), strict=True):
        if parameter.grad is not None and not (instructions and build == "dcdit"):  # decisions near a half may flip
            torch.testing.assert_close(mine, parameter.grad, rtol=near, atol=near * parameter.grad.abs().max().item())
    model.bfloat16()  # weights in that type stay what they are
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(x, steps, labels).sample).all()


@pytest.mark.parametrize("build", [DiT, DCDiT])
def test_fp64_models_stay_in_fp64_under_autocast(build):
    torch.manual_seed(0)
    model = build(sample_size=16, patch_size=1, hidden_size=32, depth=1, num_heads=2, num_classes=3).double()
    x, labels = torch.randn(2, 4, 16, 16, dtype=torch.float64), torch.tensor([0, 3])
    with torch.no_grad():
        wanted = model(x, 10, labels).sample
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x, 10, labels).sample, wanted)


def test_a_meta_model_infers_the_shape_of_its_output():
    with torch.device("meta"):
        model = DiT(sample_size=16, patch_size=1, hidden_size=32, depth=1, num_heads=2, num_classes=3)
        out = model(torch.empty(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert out.sample.shape == (2, 8, 16, 16)


def test_a_hook_may_change_the_input_of_a_sublayer_in_place():
    torch.manual_seed(0)
    block, packing = DiTBlock(24, 3, 4.0), packed((200, 260))
    block.mlp.register_forward_pre_hook(lambda _, given: given[0].mul_(0.9))
    out = block(torch.randn(packing.total, 24, requires_grad=True), torch.randn(2, 24), packing)
    out.sum().backward()
