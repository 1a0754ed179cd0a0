"""What the matrix says of classes of diffusers without an adapter, held against a tiny model of each."""

from __future__ import annotations

import pytest
import torch

import tokdyn
from tests.contract.foreign import INFERRED, REFUSED, UNFIT
from tests.contract.undeclared import TINY_UNDECLARED
from tokdyn import DepthSkip, FeatureCache, UnsupportedModelError
from tokdyn.adapters.undeclared import undeclared
from tokdyn.methods import METHODS

pytestmark = [  # diffusers' own, of a class that it moves and of attention that is not compiled
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]


@pytest.mark.parametrize("name", sorted(TINY_UNDECLARED))
@torch.no_grad()
def test_methods_act_or_are_refused(name):
    tiny, works = TINY_UNDECLARED[name], undeclared()[name].methods
    for method in (DepthSkip(blocks=(1,)), FeatureCache(threshold=1e9)):
        model, named = tiny.build(), type(method).__name__
        if named in works:
            tokdyn.wrap(model, [method])
            model(**tiny.inputs(2))
            blocks = [block.block for block in tokdyn.traces(model)[-1].blocks]
            assert blocks == ([0, 2] if named == "DepthSkip" else [0, 1, 2])
            continue
        with pytest.raises(UnsupportedModelError):
            tokdyn.wrap(model, [method])(**tiny.inputs(2))
    for kind in METHODS.values():
        if kind.__name__ not in ("DepthSkip", "FeatureCache"):
            with pytest.raises(UnsupportedModelError, match=name):
                tokdyn.wrap(tiny.build(), kind.examples()[:1])


def test_other_rows_are_held_against_models_elsewhere():
    """In test_inferred.py, unless they say that nothing has been tried."""
    for name, row in undeclared().items():
        if name in INFERRED:
            assert row.methods == ("DepthSkip", "FeatureCache")
        elif name not in TINY_UNDECLARED:
            assert row.methods == ()
            assert name in {*REFUSED, *UNFIT} or "tried" in row.reason
