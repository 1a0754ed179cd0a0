"""docs/reliability.md shows the faults that tests inject."""

from __future__ import annotations

from tests.reliability_page import PAGE, PART, faults, markdown


def test_the_page_shows_what_the_tests_inject() -> None:
    shown = PART.search(PAGE.read_text())
    assert shown is not None
    assert shown[2].strip() == markdown(), f"python tests/reliability_page.py writes the table of {PAGE.name} anew"


def test_every_fault_has_a_row_of_its_own() -> None:
    rows = faults()
    assert len(rows) > 25
    assert len({row.fault for row in rows}) == len(rows)
    assert all(row.often >= 1 and row.lost for row in rows)
