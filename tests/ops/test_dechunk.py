"""De-chunking: equal to the dense formula on any grid, and its laws."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.reference import dense_dechunk
from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.ops.cpu import dechunk as cpu
from tokdyn.ops.dechunk import smooth
from tokdyn.ops.nearest import nearest_kept

grids = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
)
shares = st.sampled_from([0.02, 0.25, 0.7, 1.0])
seeds = st.integers(0, 10_000)


def case(grid, share, seed, batch=3, width=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cells = math.prod(grid)
    keep = torch.rand(batch, cells, generator=generator) < share
    keep[torch.arange(batch), torch.randint(cells, (batch,), generator=generator)] = True
    probability = torch.rand(batch, cells, generator=generator, dtype=dtype)
    return torch.randn(int(keep.sum()), width, generator=generator, dtype=dtype), probability, keep


@settings(deadline=None, max_examples=60)
@given(grids, shares, seeds, st.sampled_from([0.5, 1.0, 2.0]), st.booleans())
def test_equals_the_dense_formula_with_gradients(grid, share, seed, sigma, plain):
    features, probability, keep = case(grid, share, seed)
    features.requires_grad_()
    probability.requires_grad_()
    with ops.plain() if plain else nullcontext():
        ours = ops.dechunk(features, probability, keep, grid, sigma)
    theirs = dense_dechunk(features, probability, keep, grid, sigma)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, reference in zip(
        torch.autograd.grad(ours.square().sum(), (features, probability)),
        torch.autograd.grad(theirs.square().sum(), (features, probability)),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(grids, shares, seeds, st.sampled_from([None, 1.0]))
def test_the_gate_has_the_gradients_of_a_dense_gate(grid, share, seed, sigma):
    features, probability, keep = case(grid, share, seed)
    gate = torch.rand_like(probability)
    wanted = [t.requires_grad_() for t in (features, probability, gate)]
    packing = ops.pack(keep, grid)
    weight = torch.randn(*keep.shape, features.shape[1], dtype=torch.float64)
    ours = ops.dechunk_packed(features, probability, keep, packing, sigma, gate)
    found = torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True)
    theirs = ops.straight_through(ops.dechunk(features, probability, keep, grid, sigma), gate)
    assert torch.equal(ours, theirs)
    expected = torch.autograd.grad((theirs * weight).sum(), wanted, allow_unused=True)
    assert all(mine is not None for mine in found[::2])
    for mine, reference in zip(found, expected, strict=True):
        if reference is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(grids, shares, seeds, st.sampled_from([torch.float64, torch.bfloat16]), st.booleans())
def test_the_residual_is_added(grid, share, seed, dtype, learning):
    features, probability, keep = case(grid, share, seed)
    start = torch.randn(features.shape[1], *keep.shape, dtype=torch.float64).permute(1, 2, 0)
    before, packing = start.clone(), ops.pack(keep, grid)
    with torch.set_grad_enabled(learning):
        out = ops.dechunk_packed(features, probability, keep, packing, 1.0, residual=start, dtype=dtype)
    wanted = ops.dechunk(features, probability, keep, grid, 1.0) + before
    assert torch.equal(out, wanted.to(dtype))
    assert torch.equal(start, before)


@pytest.mark.parametrize("plain", [False, True])
def test_the_gate_keeps_packed_rows_for_its_gradient(plain):
    features, probability, keep = case((32, 32), 0.25, 0, width=64)
    saved = []
    packing = ops.pack(keep, (32, 32))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
    with hooks, ops.plain() if plain else nullcontext():
        ops.dechunk_packed(features.requires_grad_(), probability, keep, packing, None, probability.clone())
    assert saved.count(features.shape) == 1
    assert not [shape for shape in saved if math.prod(shape) >= keep.numel() * 64]


def test_a_token_of_little_confidence_is_smoothed_by_distant_ones():
    """Its own weight is 1e-4, so the Gaussian counts out to 7.3 sigmas in fp32."""
    keep = torch.zeros(1, 32 * 32, dtype=torch.bool)
    keep[0, [0, 7]] = True
    probability = torch.full((1, 32 * 32), 1.0)
    probability[0, 0] = 0.0
    features = torch.tensor([[0.0], [1000.0]])
    ours = ops.dechunk(features, probability, keep, (32, 32), 1.0)
    theirs = dense_dechunk(features.double(), probability.double(), keep, (32, 32), 1.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)  # 1e-7 of the features
    assert ours[0, 0, 0] > 1e-4


@pytest.mark.parametrize("sigma", [0.05, 9.0, 1e4])
@pytest.mark.parametrize("grid", [(30,), (9, 4), (1, 25), (3, 4, 5)])
def test_kernels_narrower_than_a_cell_and_wider_than_the_grid(grid, sigma):
    features, probability, keep = case(grid, 0.4, 2)
    ours = ops.dechunk(features, probability, keep, grid, sigma)
    theirs = dense_dechunk(features, probability, keep, grid, sigma)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_nan_probabilities_give_nan_in_their_own_sample_alone():
    """A diverged model shows in its loss; de-chunking raises no error."""
    features, probability, keep = case((5, 5), 0.4, 2)
    probability[1] = math.nan
    out = ops.dechunk(features, probability, keep, (5, 5), 1.0)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@settings(deadline=None, max_examples=30)
@given(grids, shares, seeds)
def test_both_forms_of_smoothing_agree(grid, share, seed):
    """The plain function smooths on the grid, the CPU form over lists of neighbours."""
    features, probability, keep = case(grid, share, seed)
    packing = ops.pack(keep, grid)
    kept = probability.flatten()[packing.index].clamp(1e-4, 1 - 1e-4)
    with ops.plain():
        on_grid = smooth(features, kept, packing, 1.0)
    torch.testing.assert_close(on_grid, smooth(features, kept, packing, 1.0), rtol=0, atol=1e-12)


def test_the_pairs_that_smoothing_sums_grow_with_the_number_of_tokens():
    """Sixteen times the cells have sixteen times the pairs; all pairs of tokens would be 256 times as many."""
    found = []
    for side in (64, 256):
        _, _, keep = case((side, side), 0.25, 4, batch=1)
        packing = ops.pack(keep, (side, side))
        found.append(len(cpu._neighbours(packing, torch.full((packing.total,), 6.0), 1.0)[0]) / packing.total)
    assert found[1] == pytest.approx(found[0], rel=0.25)  # discs are clipped at the border of the small grid


def test_long_axes_blur_by_shifted_sums():
    features, probability, keep = case((200, 3), 0.3, 1)
    packing = ops.pack(keep, (200, 3))
    kept = probability.flatten()[packing.index].clamp(1e-4, 1 - 1e-4)
    with ops.plain():
        on_grid = smooth(features, kept, packing, 1.0)
    torch.testing.assert_close(on_grid, smooth(features, kept, packing, 1.0), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(grids, shares, seeds)
def test_nearest_is_idempotent_onto_the_kept_set(grid, share, seed):
    _, _, keep = case(grid, share, seed)
    nearest = nearest_kept(keep, grid)
    assert keep.gather(1, nearest).all()
    cells = torch.arange(keep.shape[1]).expand_as(nearest)
    torch.testing.assert_close(nearest[keep], cells[keep])


def test_nearest_breaks_ties_by_raster_index():
    keep = torch.zeros(1, 9, dtype=torch.bool)
    keep[0, [1, 3, 5, 7]] = True
    assert nearest_kept(keep, (3, 3))[0, 4] == 1


def test_nearest_on_a_grid_whose_keys_need_64_bits():
    keep = torch.zeros(1, 300 * 300, dtype=torch.bool)
    keep[0, [0, 300 * 300 - 1]] = True
    nearest = nearest_kept(keep, (300, 300)).view(300, 300)
    assert nearest[0, 299] == 0  # equally far from both corners
    assert nearest[299, 299] == 300 * 300 - 1
    assert nearest[10, 10] == 0


@settings(deadline=None, max_examples=25)
@given(grids, shares, seeds)
def test_constants_are_preserved_and_outputs_stay_in_the_hull(grid, share, seed):
    features, probability, keep = case(grid, share, seed)
    constant = ops.dechunk(torch.full_like(features, 1.75), probability, keep, grid, 1.0)
    torch.testing.assert_close(constant, torch.full_like(constant, 1.75), rtol=0, atol=1e-3)  # eps over p >= 1e-4
    out = ops.dechunk(features, probability, keep, grid, 1.0)
    for sample, rows in zip(out, features.split(keep.sum(1).tolist()), strict=True):
        slack = 1e-3 * features.abs().max()
        assert (sample.amax(0) <= rows.amax(0) + slack).all()
        assert (sample.amin(0) >= rows.amin(0) - slack).all()


@settings(deadline=None, max_examples=25)
@given(grids, seeds)
def test_everything_kept_with_certainty_is_the_identity(grid, seed):
    features, _, _ = case(grid, 1.0, seed)
    keep = torch.ones(3, math.prod(grid), dtype=torch.bool)
    features = features[: keep.sum()] if len(features) >= keep.sum() else torch.randn(int(keep.sum()), 5).double()
    out = ops.dechunk(features, torch.ones(keep.shape, dtype=torch.float64), keep, grid, 1.0)
    torch.testing.assert_close(out.flatten(0, 1), features, rtol=0, atol=2e-3)  # p is clamped to 1 - 1e-4
    plain = ops.dechunk(features, torch.rand(keep.shape), keep, grid, None)
    assert torch.equal(plain.flatten(0, 1), features)


@settings(deadline=None, max_examples=20)
@given(grids, shares, seeds)
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(grid, share, seed):
    features, probability, keep = case(grid, share, seed)
    together = ops.dechunk(features, probability, keep, grid, 1.0)
    lengths = keep.sum(1).tolist()
    for b, rows in enumerate(features.split(lengths)):
        alone = ops.dechunk(rows, probability[b : b + 1], keep[b : b + 1], grid, 1.0)
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=1e-13)


def test_half_precision_is_smoothed_in_fp32():
    features, probability, keep = case((8, 8), 0.3, 3, dtype=torch.float32)
    half = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = ops.dechunk(half, probability, keep, (8, 8), 1.0)
    exact = ops.dechunk(half.float(), probability, keep, (8, 8), 1.0)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": torch.zeros(3, 4)}, r"\(2, D\)"),
        ({"probability": torch.zeros(2, 5)}, r"\(2, 5\)"),
        ({"grid": (4, 5)}, r"\(4, 5\)"),
        ({"grid": (1, 1, 4, 4)}, r"\(1, 1, 4, 4\)"),
        ({"keep": torch.zeros(2, 16, dtype=torch.bool)}, "sample 0"),
        ({"sigma": -1.0}, "-1.0"),
        ({"sigma": math.nan}, "nan"),
        ({"sigma": math.inf}, "inf"),
        ({"grid": (-4, -4)}, r"\(-4, -4\)"),
        ({"keep": torch.ones(2, 16, dtype=torch.int64)}, "torch.int64"),
        ({"keep": torch.zeros(0, 16, dtype=torch.bool), "probability": torch.zeros(0, 16)}, r"\(0, 16\)"),
        ({"keep": torch.ones(2, 16, dtype=torch.bool, device="meta")}, "meta"),
        ({"features": torch.zeros(2, 4, dtype=torch.int64)}, "torch.int64"),
        ({"features": torch.zeros(2, 0)}, r"\(2, D\)"),
    ],
)
def test_wrong_input_raises(change, words):
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[:, 3] = True
    given_ = {"features": torch.zeros(2, 4), "probability": torch.zeros(2, 16), "keep": keep, "grid": (4, 4)}
    with pytest.raises(InputError, match=words):
        ops.dechunk(**{**given_, "sigma": 1.0, **change})
