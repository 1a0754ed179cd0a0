"""Pages: nothing in a file can become script, nothing is loaded from elsewhere, and numbers get readable axes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.pages import HOSTILE, full_page
from tokdyn.report.charts import Line, bars, chart, number, ticks
from tokdyn.report.html import code, data, html, tag


class Reader(HTMLParser):
    """Collects elements with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))

    def handle_data(self, text: str) -> None:
        self.text += text


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_stay_texts(text):
    read = Reader(tag("p", text, title=text) + code(text))
    assert [name for name, _ in read.elements] == ["p", "div", "button", "pre", "code"]
    assert read.elements[0][1]["title"] == text
    assert text in read.text


@pytest.mark.parametrize("text", HOSTILE)
def test_data_of_scripts_cannot_end_their_element(text):
    element = data({"name": text}, "x")
    assert element.count("<") == 2
    assert json.loads(re.sub(r"^<[^>]*>|<[^>]*>$", "", element)) == {"name": text}


def test_names_that_are_no_text_can_be_written():
    assert html("caf\udce9").encode() == b"caf?"


def test_a_page_has_one_script_of_ours_and_loads_nothing():
    page = Reader(full_page().render())
    scripts = [attributes for name, attributes in page.elements if name == "script"]
    assert [each for each in scripts if each.get("type") != "application/json"] == [{}]
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    sources = [value for _, attributes in page.elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert not [name for name, _ in page.elements if name in ("link", "iframe", "object", "embed", "form")]


numbers = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: float(f"{value:.6g}"))


@given(numbers, numbers)
def test_ticks_enclose_the_range_and_are_few(one, other):
    low, high = sorted((one, other))
    made = ticks(low, high)
    step = made[1] - made[0]
    assert 2 <= len(made) <= 8
    assert made[0] <= low + 1e-6 * step
    assert made[-1] >= high - 1e-6 * step
    np.testing.assert_allclose(np.diff(made), step, rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.25, "0.25"), (1234567.0, "1.23e+06"), (12345.0, "12,345"), (0.00001, "1.00e-05")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_values_that_are_not_finite_are_left_out():
    nan, infinite = float("nan"), float("inf")
    drawn = chart([Line("a", [0, 1, 2, 3], [1.0, nan, infinite, 2.0]), Line("b", [0], [nan])], "t", "x", "y")
    (svg,) = [attributes for name, attributes in Reader(drawn).elements if "data-points" in attributes]
    assert len(json.loads(svg["data-points"])) == 2
    assert chart([Line("b", [0], [nan])], "t", "x", "y") == ""
    assert bars({"a": {"part": 0.0}}, "t", "ms") == ""


def test_long_lines_are_thinned_and_keep_their_ends():
    drawn = chart([Line("a", list(range(5000)), [float(x) for x in range(5000)])], "t", "x", "y")
    (svg,) = [attributes for name, attributes in Reader(drawn).elements if "data-points" in attributes]
    points = json.loads(svg["data-points"])
    assert len(points) < 500
    assert "4,999" in points[-1][2]
