"""The frozen state between stages: sizes, the maps between packed and padded rows, and what a router decided."""

import dataclasses
import importlib
import pkgutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn import ops
from tokdyn.tokens import TILE, Routing, aligned, cells

lengths_of_samples = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def packing_of(lengths, spare=3):
    """Keep the last cells of every sample, so that no index is trivial."""
    keep = torch.zeros(len(lengths), max(lengths) + spare, dtype=torch.bool)
    for row, length in zip(keep, lengths, strict=True):
        row[-length:] = True
    return ops.pack(keep, (keep.shape[1],))


@given(st.integers(0, 10_000))
def test_rows_are_aligned_to_the_next_whole_tile(rows):
    assert aligned(rows) % TILE == 0
    assert rows <= aligned(rows) < rows + TILE


def test_tiles_are_those_of_attention_kernels():
    assert [aligned(rows) for rows in (1, 16, 17)] == [16, 16, 32]


@pytest.mark.parametrize(("grid", "count"), [((7,), 7), ((3, 5), 15), ((2, 3, 5), 30)])
def test_a_grid_has_as_many_cells_as_its_sizes_multiply_to(grid, count):
    assert cells(grid) == count


@given(lengths_of_samples)
def test_padding_there_and_back_changes_nothing(lengths):
    packing = packing_of(lengths)
    padding, count = packing.padded, len(lengths)
    assert (packing.total, packing.longest) == (sum(lengths), max(lengths))
    assert padding.rows == aligned(max(lengths))
    assert padding.gather.shape == (count * padding.rows,)
    rows = torch.arange(packing.total)
    padded = rows[padding.gather].view(count, padding.rows)
    assert torch.equal(padded.flatten()[padding.scatter], rows)
    for sample, part in enumerate(rows.split(lengths)):
        assert torch.equal(padded[sample, : len(part)], part)  # real rows come first, in order
        assert set(padded[sample].tolist()) == set(part.tolist())  # empty slots hold rows of their own sample


@given(lengths_of_samples)
def test_only_empty_slots_are_masked(lengths):
    padding = packing_of(lengths).padded
    assert padding.bias.shape == (len(lengths), 1, 1, padding.rows)
    assert padding.bias.dtype == torch.float32
    for bias, length in zip(padding.bias[:, 0, 0], lengths, strict=True):
        assert (bias[:length] == 0).all()
        assert (bias[length:] == float("-inf")).all()


@given(lengths_of_samples)
def test_maps_index_in_the_type_of_the_packing(lengths):
    padding = packing_of(lengths).padded
    assert padding.gather.dtype == padding.scatter.dtype == torch.int64


def test_padding_is_built_once():
    packing = packing_of([3, 5])
    assert packing.padded is packing.padded


def test_a_routing_counts_before_and_after_tail_drop():
    natural = torch.tensor([[True, True, False, True], [False, True, False, False]])
    keep = torch.tensor([[True, False, False, True], [False, True, False, False]])
    routing = Routing(torch.rand(2, 4), keep, natural, (2, 2))
    assert (routing.kept.tolist(), routing.natural_kept.tolist()) == ([2, 1], [3, 1])
    assert routing.decided is None
    assert routing.losses == {}


def test_losses_of_one_decision_are_not_those_of_another():
    one, other = (Routing(torch.rand(1, 2), *[torch.ones(1, 2, dtype=torch.bool)] * 2, (2,)) for _ in range(2))
    one.losses["ratio"] = torch.zeros(())
    assert other.losses == {}


def dataclasses_of(*rooms):
    """Return the dataclasses that some modules and packages define."""
    modules = [importlib.import_module(name) for name in rooms]
    for module in tuple(modules):
        inside = pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}.")
        modules += [importlib.import_module(each.name) for each in inside]
    found = {each for module in modules for each in vars(module).values() if dataclasses.is_dataclass(each)}
    return sorted((each for each in found if each.__module__.startswith(rooms)), key=lambda each: each.__qualname__)


ROOMS = ("tokdyn.tokens", "tokdyn.compose", "tokdyn.ops", "tokdyn.methods", "tokdyn.diffusion", "tokdyn.upcycling")


@pytest.mark.parametrize("kind", dataclasses_of(*ROOMS), ids=lambda kind: kind.__qualname__)
def test_plain_data_is_frozen(kind):
    state = object.__new__(kind)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(state, field.name, None)
