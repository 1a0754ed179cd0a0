"""Routers: equal to their formulas written cell by cell, calibrated for any N, exact in every precision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.methods.routers import CosineRouter, RandomRouter, SpatialPredictabilityRouter, build_router

NAMES = ["spatial_predictability", "cosine", "random"]
GRIDS = [(5, 7), (1, 6), (4, 1), (2, 2)]


def tokens(grid, width=16, batch=3, dtype=torch.float64):
    return torch.randn(batch, width, *grid, dtype=dtype)


def shaken(router):
    for parameter in router.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return router.double()


def around(x):
    """(B, C, R, C) to (9, B, C, R, C): every cell's 3x3 neighbourhood in raster order, zero outside."""
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    rows, columns = x.shape[-2:]
    return torch.stack([padded[..., r : r + rows, c : c + columns] for r in range(3) for c in range(3)])


def conv3x3(x, module):
    weight = module.weight.flatten(2)  # (out, in, 9)
    return torch.einsum("kbirc,oik->borc", around(x), weight) + module.bias[:, None, None]


def conv1x1(x, module):
    return torch.einsum("birc,oi->borc", x, module.weight[:, :, 0, 0]) + module.bias[:, None, None]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [16, 64, 24])
def test_spatial_predictability_is_its_formula(grid, width):
    router, x = shaken(SpatialPredictabilityRouter(width)), tokens(grid, width)
    z = conv1x1(x, router.proj)
    first, norm, _, last = router.score
    h = conv3x3(z - conv3x3(z, router.context), first)
    groups = h.reshape(len(h), math.gcd(8, width // 4), -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, unbiased=False, keepdim=True)
    h = ((groups - mean) / (variance + norm.eps).sqrt()).view_as(h)
    h = h * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = conv1x1(h * h.sigmoid(), last)[:, 0]
    torch.testing.assert_close(router(x, torch.zeros(3)), expected, rtol=0, atol=1e-12)


def test_a_map_that_its_surroundings_predict_has_no_residual():
    """z - K * z is zero when K copies the cell to the left and all columns are alike, but for the border."""
    router = SpatialPredictabilityRouter(8).double()
    with torch.no_grad():
        router.context.bias.zero_()
        router.context.weight.zero_()
        for channel in range(2):
            router.context.weight[channel, channel, 1, 0] = 1.0
    x = tokens((4, 1), 8).expand(-1, -1, -1, 9)
    z = router.proj(x)
    residual = z - router.context(z)
    assert residual[..., 1:].abs().max() < 1e-12
    assert residual[..., 0].abs().max() > 0.1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("fresh", [True, False])
def test_cosine_is_its_formula(grid, fresh):
    router = CosineRouter(16).double()
    router = router if fresh else shaken(router)
    x = tokens(grid)
    logits = router(x, torch.zeros(3))
    rows, columns = grid
    for b in range(3):
        for r in range(rows):
            for c in range(columns):
                query = router.query.weight @ x[b, :, r, c]
                total = torch.zeros(16, dtype=torch.float64)
                for dr in (-1, 0, 1):
                    for dc in (-1, 0, 1):
                        if 0 <= r + dr < rows and 0 <= c + dc < columns:
                            key = router.key.weight @ x[b, :, r + dr, c + dc]
                            total += router.neighbours.weight[:, 0, dr + 1, dc + 1] * key / key.norm()
                p = (1 - torch.cosine_similarity(query, total, dim=0)) / 2
                assert logits[b, r, c].item() == pytest.approx(torch.logit(p).item() + router.offset.item(), abs=1e-9)


def test_a_fresh_cosine_router_compares_a_cell_with_the_mean_of_its_neighbours():
    """A constant map is predictable everywhere, at its border too; one odd cell stands out."""
    x = torch.ones(1, 16, 5, 5)
    x[0, :, 2, 2] = -1.0
    p = CosineRouter(16)(x, torch.zeros(1)).sigmoid()[0]
    assert p[2, 2] > 0.99
    p[2, 2] = 0.0
    assert p.max() < 0.01


@given(st.floats(1.2, 60), st.integers(1, 5))
def test_calibration_of_any_target_keeps_one_in_n(target, batch):
    for name in ("spatial_predictability", "cosine"):
        router = build_router(name, 16, 4.0)
        x = tokens((9, 11), batch=batch, dtype=torch.float32)
        for _ in range(2):  # from any bias: the second time it is there already
            router.calibrate(router(x, torch.zeros(batch)), target)
            kept = int((router(x, torch.zeros(batch)) > 0).sum())
            assert abs(kept - max(1, round(batch * 99 / target))) <= 1  # rounding may move the cell at the edge


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_types(name):
    router = build_router(name, 16, 4.0)
    for dtype in (torch.float32, torch.float64):
        logits = router(tokens((5, 7), dtype=dtype), torch.tensor([1, 2, 3]))
        assert logits.shape == (3, 5, 7)
        assert logits.dtype == dtype
        assert logits.isfinite().all()
    assert router.bias.numel() == 1
    half = build_router(name, 16, 4.0).bfloat16()
    assert half(tokens((5, 7), dtype=torch.float32), torch.zeros(3)).dtype == torch.float32


@pytest.mark.parametrize("target", [1.5, 4.0, 16.0])
def test_random_boundaries_have_their_rate_in_every_cell_and_no_memory(target):
    router = RandomRouter(target).eval()
    keep = (router(torch.zeros(2000, 1, 8, 8), torch.arange(2000)) > 0).double().flatten(1)
    spread = math.sqrt((1 - 1 / target) / target)
    assert keep.mean().item() == pytest.approx(1 / target, abs=4 * spread / math.sqrt(keep.numel()))
    assert (keep.mean(0) - 1 / target).abs().max() < 5 * spread / math.sqrt(2000)  # 64 cells, five deviations each
    for one, other in ((keep[:-1], keep[1:]), (keep[:, :-1], keep[:, 1:])):  # timesteps, cells
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(one.numel())


def test_random_boundaries_are_drawn_per_sample_in_training_only():
    router = RandomRouter(4.0)
    x, steps = torch.zeros(3, 1, 8, 8), torch.tensor([5, 5, 6])
    drawn = router(x, steps)
    assert not torch.equal(drawn[0], drawn[1])
    router.eval()
    drawn = router(x, steps)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(router(x[:1], steps[2:])[0], drawn[2])
    assert not any(parameter.requires_grad for parameter in router.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_for_their_routers(name):
    kinds = {"spatial_predictability": SpatialPredictabilityRouter, "cosine": CosineRouter, "random": RandomRouter}
    assert type(build_router(name, 16, 4.0)) is kinds[name]
    assert build_router(name, 1, 4.0)(torch.randn(1, 1, 3, 3), torch.zeros(1)).isfinite().all()


def test_a_fresh_spatial_router_keeps_less_than_half():
    router = SpatialPredictabilityRouter(64)
    torch.nn.init.zeros_(router.score[3].weight)
    assert (
        router(tokens((2, 2), 64, dtype=torch.float32), torch.zeros(3)).tolist()
        == [[[pytest.approx(-1.1)] * 2] * 2] * 3
    )


def test_a_calibration_lies_between_the_last_kept_and_the_first_dropped():
    router = CosineRouter(8)
    torch.nn.init.constant_(router.bias, 3.0)
    logits = torch.tensor([[1.0, 5.0], [3.0, 9.0]])  # the two largest are 9 and 5, then 3
    router.calibrate(logits, 2.0)
    assert router.bias.item() == pytest.approx(3.0 - 4.0)
    router.calibrate(torch.tensor([2.0, 8.0]), 100.0)  # at least one is kept
    assert router.bias.item() == pytest.approx(-1.0 - 5.0)
    router.calibrate(torch.tensor([2.0, 8.0]), 1.0)  # all of them: there is no first dropped
    assert router.bias.item() == pytest.approx(-6.0 - 2.0)
    assert router.bias.requires_grad


def test_a_random_router_is_calibrated_exactly():
    router = RandomRouter(4.0)
    assert router.bias.item() == pytest.approx(-math.log(3.0))
    router.calibrate(torch.randn(10), 16.0)
    assert router.bias.item() == pytest.approx(-math.log(15.0))


@pytest.mark.parametrize("training", [True, False])
def test_frames_of_one_sample_have_noise_of_their_own(training):
    router = RandomRouter(4.0).train(training)
    logits = router(torch.zeros(6, 1, 4, 4), torch.tensor([5, 9]), 3)
    assert logits.shape == (6, 4, 4)
    assert len({tuple(row.flatten().tolist()) for row in logits}) == 6
    if not training:
        alone = router(torch.zeros(3, 1, 4, 4), torch.tensor([9]), 3)
        assert torch.equal(alone, logits[3:])


def test_noise_of_close_timesteps_differs():
    """Flow times are fractions: a 64th of a timestep makes other noise, less does not."""
    router = RandomRouter(4.0).eval()
    x = torch.zeros(1, 1, 8, 8)
    at = {step: router(x, torch.tensor([step])) for step in (5.0, 5.0 + 1 / 64, 5.0 + 1 / 1024)}
    assert not torch.equal(at[5.0], at[5.0 + 1 / 64])
    assert torch.equal(at[5.0], at[5.0 + 1 / 1024])


def test_a_map_that_is_predicted_exactly_has_a_finite_logit():
    """p is kept 1e-6 away from 0 and 1, so that a constant map has gradients."""
    x = torch.ones(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    logits = CosineRouter(4).double()(x, torch.zeros(1))
    torch.testing.assert_close(logits, torch.full_like(logits, math.log(1e-6 / (1 - 1e-6))), rtol=0, atol=1e-6)
    assert torch.autograd.grad(logits.sum(), x)[0].isfinite().all()
