"""Two versions of tokdyn in one process, for `benchmarks.overhead`."""

from pathlib import Path

import pytest
import torch

import tokdyn
from benchmarks import overhead
from tokdyn.errors import InputError


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    return overhead.load_older(str(Path(tokdyn.__file__).parents[1]), tmp_path_factory.mktemp("older"))


def test_an_older_version_shares_nothing_with_this_one(older):
    assert older.DiT is not tokdyn.DiT
    model = older.wrap(older.DiT(sample_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2), [])
    assert not hasattr(model, "tokdyn")
    with pytest.raises(tokdyn.InputError):
        tokdyn.unwrap(model)
    older.unwrap(model)


@torch.no_grad()
def test_every_call_after_the_first_is_a_cached_step(older):
    model = older.wrap(
        older.DiT(sample_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2), [older.FeatureCache(steps=(0,))]
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.full((2,), 900), "class_labels": torch.arange(2)
    }  # fmt: skip
    prepare = overhead.stepping(older, model, inputs, steps=4)
    for _ in range(7):
        prepare()()
        assert older.stats(model).calls[-1].reused == 2


def test_what_is_compared_with_has_to_be_there(tmp_path):
    for against in (str(tmp_path), "no-such-revision"):
        with pytest.raises(InputError):
            overhead.load_older(against, tmp_path)
