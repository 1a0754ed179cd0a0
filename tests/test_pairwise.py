"""The pairwise covering that the default suite runs instead of whole products."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pairwise import covering, pairs_of

pytest_plugins = ["pytester"]

FACTORS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@st.composite
def rows_with_gaps(draw):
    """Combinations of a product, of which some do not exist."""
    rows = [tuple(enumerate(values)) for values in product(*map(range, draw(FACTORS)))]
    return draw(st.lists(st.sampled_from(rows), unique=True, max_size=60))


@given(rows_with_gaps())
def test_every_pair_that_occurs_is_covered_and_no_row_is_idle(rows):
    chosen = covering(rows)
    assert set().union(*(pairs_of(row) for row in rows)) == set().union(*(pairs_of(rows[i]) for i in chosen))
    assert chosen == sorted(set(chosen))


def test_a_product_of_three_factors_needs_little_more_than_its_largest_face():
    rows = [tuple(enumerate(values)) for values in product(range(6), range(20), range(20))]
    assert 400 <= len(covering(rows)) <= 480


def test_of_a_costly_factor_as_few_rows_as_possible_are_taken():
    rows = [tuple(enumerate(values)) for values in product(range(3), range(9), range(7))]
    chosen = [rows[i] for i in covering(rows, [100.0 if row[0][1] == 0 else 1.0 for row in rows])]
    assert sum(row[0][1] == 0 for row in chosen) == 9
    assert {row[2][1] for row in chosen if row[0][1] == 0} == {*range(7)}


SUITE = """
import pytest

MODELS, METHODS = range(4), range(5)

@pytest.mark.pairwise("laws")
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_first(name, methods): pass

@pytest.mark.pairwise("laws")
@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_second(name, methods): pass

@pytest.mark.parametrize("name", MODELS)
def test_alone(name): pass
"""


@pytest.fixture
def suite(pytester, request):
    """A suite of two laws of 4 x 5 combinations and 4 other tests, under the hooks of this one."""
    pytester.makeconftest("from tests.conftest import pytest_addoption, pytest_collection_modifyitems")
    pytester.makeini(f"[pytest]\npythonpath = {request.config.rootpath}\nmarkers = pairwise(group): of this project\n")
    pytester.makepyfile(test_laws=SUITE)
    return pytester


@pytest.mark.parametrize(
    ("arguments", "passed", "deselected"),
    [([], 20 + 4, 20), (["--product"], 44, 0), (["test_laws.py::test_second[2-3]"], 1, 0), (["-k", "alone"], 4, 40)],
)
def test_the_default_is_a_covering_and_what_is_named_runs(suite, arguments, passed, deselected):
    outcome = suite.runpytest_inprocess(*arguments, "-p", "no:cacheprovider")
    outcome.assert_outcomes(passed=passed, deselected=deselected)
