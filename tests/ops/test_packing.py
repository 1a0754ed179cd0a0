"""Packing: the same rows whether the kept tokens are given as a mask or as an index."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn import ops
from tokdyn.errors import InputError
from tokdyn.ops.pack import pack_index
from tokdyn.ops.routing import most_probable

GRID = (3, 5)


def equal(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()) if isinstance(a, torch.Tensor) else a == b


@given(st.lists(st.integers(1, 15), min_size=1, max_size=4), st.integers(0, 1000))
def test_an_index_packs_the_rows_of_its_mask(counts, seed):
    p = torch.rand(len(counts), 15, generator=torch.Generator().manual_seed(seed))
    index = most_probable(p, tuple(counts))
    keep = torch.zeros(len(counts), 15, dtype=torch.bool)
    for row, count in enumerate(counts):
        keep[row, index[row, :count]] = True
    equal(pack_index(index, tuple(counts), GRID), ops.pack(keep, GRID))


@given(st.lists(st.integers(1, 15), min_size=1, max_size=4), st.integers(0, 1000))
def test_the_most_probable_cells_come_in_raster_order_before_what_fills_up(counts, seed):
    p = torch.randint(0, 5, (len(counts), 15), generator=torch.Generator().manual_seed(seed)) / 4
    index = most_probable(p, tuple(counts))
    assert index.shape == (len(counts), max(counts))
    for row, count in enumerate(counts):
        ranked = sorted(range(15), key=lambda cell, row=row: (-p[row, cell].item(), cell))
        assert index[row, :count].tolist() == sorted(ranked[:count])
        assert len(set(index[row].tolist())) == max(counts)


def test_ties_of_many_cells_go_to_the_first():
    """A sort that is not stable mixes equal numbers from 17 on."""
    assert most_probable(torch.full((1, 900), 0.5), (300,)).tolist() == [list(range(300))]
    p, keep = torch.full((1, 900), 0.7), torch.ones(1, 900, dtype=torch.bool)
    assert ops.tail_drop(p, keep, 0.5).nonzero()[:, 1].tolist() == list(range(450, 900))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (torch.ones(2, 14, dtype=torch.bool), r"\(2, 14\).*15.*\(3, 5\)"),
        (torch.ones(15, dtype=torch.bool), r"\(15,\)"),
        (torch.ones(0, 15, dtype=torch.bool), r"\(0, 15\)"),
        (torch.ones(2, 15), "float32"),
        (torch.ones(2, 15, dtype=torch.bool, device="meta"), "meta"),
        (torch.arange(30).view(2, 15) < 15, "sample 1 "),
    ],
)
def test_what_cannot_be_packed_is_named(keep, words):
    with pytest.raises(InputError, match=words):
        ops.pack(keep, GRID)
