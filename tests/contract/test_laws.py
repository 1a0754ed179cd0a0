"""The laws of `tokdyn.testing`, for every method on every adapter."""

import copy

import pytest

from tests.contract.kit import SHARED
from tests.contract.models import CLOCKED, TINY
from tests.contract.stacks import ACTIVE, PAIRS, acting, at_levels
from tokdyn.testing import LAWS, Case

BY_NAME = {law.__name__: law for law in LAWS}


@pytest.mark.pairwise("laws")
@pytest.mark.parametrize(("name", "methods"), PAIRS)
@pytest.mark.parametrize("law", BY_NAME)
def test_laws_hold(law, name, methods):
    """Samples of one call stand at different noise levels, if the model has any."""
    model = TINY[name].build()
    BY_NAME[law](
        Case(
            build=lambda: copy.deepcopy(model),
            call=at_levels(name) if name in CLOCKED else TINY[name].inputs(3),
            methods=tuple(ACTIVE[methods]),
            shared=SHARED,
            tolerance=1e-5,
            prepare=acting,
        )
    )
