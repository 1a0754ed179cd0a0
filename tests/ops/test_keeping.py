"""Masks of tokens to keep: any size of picture, one for all samples or one for each."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.errors import InputError
from tokdyn.ops.keeping import fit_mask, mask_of

sides = st.integers(1, 7)


def overlaps(mask, grid):
    """Whether any entry of a mask overlaps each cell, cell by cell."""
    found = torch.zeros(grid, dtype=torch.bool)
    for cell in torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist():
        inside = mask
        for axis, (at, size, entries) in enumerate(zip(cell, grid, mask.shape, strict=True)):
            first, last = at * entries // size, -(-(at + 1) * entries // size)
            inside = inside.narrow(axis, first, last - first)
        found[tuple(cell)] = inside.any()
    return found.flatten()


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.integers(0, 100))
def test_a_token_is_kept_if_any_entry_over_its_cell_is_true(axes, seed):
    grid, shape = (tuple(each) for each in zip(*axes, strict=True))
    mask = torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    expected = torch.stack([overlaps(each, grid) for each in mask])
    if mask.dim() > 2 or mask.shape[1] != math.prod(grid):
        assert torch.equal(fit_mask(mask, grid, 3), expected)
        assert torch.equal(fit_mask(mask, grid, 6), expected.repeat(2, 1))
    if not (len(shape) == 2 and shape[1] == math.prod(grid)):
        assert torch.equal(fit_mask(mask[0], grid, 2), expected[:1].expand(2, -1))


def test_tokens_may_be_named_one_by_one_and_pictures_stand_for_all_frames():
    one = torch.rand(24) < 0.5
    assert torch.equal(fit_mask(one, (4, 6), 2), one.expand(2, -1))
    square = torch.rand(16, 16) < 0.1  # as wide as there are tokens, but not for as many samples
    assert torch.equal(fit_mask(square, (4, 4), 2), fit_mask(square[None], (4, 4), 2))
    each = torch.rand(2, 24) < 0.5
    assert torch.equal(fit_mask(each, (4, 6), 4), torch.cat([each, each]))
    assert torch.equal(fit_mask(one.view(4, 6), (3, 4, 6), 1)[0], one.repeat(3))


def test_the_parts_of_a_sample_have_parts_of_its_mask():
    """Frames are consecutive tokens; the frames at one place lie a frame's tokens apart."""
    kept = torch.rand(3, 24) < 0.5
    frames, places = (mask_of(kept, (2, 3, 4), (0,) * n + (2,) * n, part) for n, part in ((2, (3, 4)), (12, (2,))))
    assert torch.equal(frames, torch.cat([kept[0].view(2, 12), kept[2].view(2, 12)]))
    assert torch.equal(places, torch.cat([kept[0].view(2, 12).T, kept[2].view(2, 12).T]))
    assert torch.equal(mask_of(kept, (2, 3, 4), (2, 1)), kept[[2, 1]])


@pytest.mark.parametrize(
    ("shape", "batch", "words"),
    [((5,), 1, r"\(5,\).*4 x 6.*\(24,\)"), ((2, 3, 4, 5), 2, "rows, columns"), ((3, 4, 6), 4, "3 samples.*holds 4")],
)
def test_masks_that_do_not_fit_raise(shape, batch, words):
    with pytest.raises(InputError, match=words):
        fit_mask(torch.ones(shape, dtype=torch.bool), (4, 6), batch)
