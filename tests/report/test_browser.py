"""Pages in a real browser: the slider moves, images change, keys work, nothing overlaps, nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import PATIENCE, launched
from tests.report.pages import GRID, LEVELS, SIZE, frames, full_page
from tokdyn.report.maps import shade

PIXELS = "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(each => [each.textContent, each.getBoundingClientRect()]);
  const cut = svg.getBoundingClientRect();
  const outside = texts.filter(([, b]) =>
    b.left < cut.left - 1 || b.right > cut.right + 1 || b.bottom > cut.bottom + 1);
  const pairs = texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([, q]) =>
    p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom).map(([b]) => [a, b]));
  return [...outside.map(([a]) => [a, 'edge']), ...pairs];
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_page().write(tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Any]:
    """Open pages in a window of a size, and check afterwards that nothing was complained about and nothing loaded."""
    contexts, complaints = [], []

    def open_page(width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda sent: None if sent.url.startswith(("file:", "data:")) else complaints.append(sent.url)
        )
        page.goto(path.as_uri())
        page.wait_for_selector(".explorer[data-shown]")
        return page

    yield open_page
    hacked = [context.pages[0].evaluate("window.hacked") for context in contexts]
    for context in contexts:
        context.close()
    assert complaints == []
    assert hacked == [None] * len(hacked)


def canvas(page: Any, place: int) -> np.ndarray:
    """The pixels (height, width, 3) of a picture of the explorer."""
    found = page.locator(".explorer canvas").nth(place)
    height, width = found.evaluate("canvas => [canvas.height, canvas.width]")
    return np.array(found.evaluate(PIXELS), dtype=np.uint8).reshape(height, width, 4)[..., :3]


def test_slider_shows_every_level_and_the_map_that_figures_show(opened):
    page, drawn = opened(), frames()
    slider = page.locator(".slider")
    slider.focus()
    page.keyboard.press("Home")
    for place in range(LEVELS):
        page.wait_for_selector(f".explorer[data-shown='{place}']")
        frame = drawn[place]
        assert f"{frame.level:.2f}" in page.locator(".explorer output").text_content()
        share = float(page.locator(".explorer .kept").nth(1).text_content().removesuffix("%"))
        assert share == pytest.approx(100 * frame.keep[1].mean(), abs=0.051)
        shown = canvas(page, 1)
        scale = len(shown) // SIZE
        expected = shade(frame.pictures[1].repeat(scale, 0).repeat(scale, 1), frame.keep[1])
        assert np.abs(shown.astype(int) - expected).max() <= 1
        page.keyboard.press("ArrowRight")
    assert len(shown) // GRID[0] >= 8


def test_map_can_be_taken_off_with_the_keyboard(opened):
    page = opened()
    before = canvas(page, 0)
    page.locator(".explorer .map").focus()
    page.keyboard.press("Space")
    page.wait_for_function("document.querySelector('.explorer .map').checked === false")
    page.wait_for_timeout(100)
    image = frames()[LEVELS // 2].pictures[0]
    scale = len(before) // SIZE
    assert np.array_equal(canvas(page, 0), image.repeat(scale, 0).repeat(scale, 1))
    assert not np.array_equal(before, canvas(page, 0))


def test_play_walks_to_the_image_and_stops(opened):
    page = opened()
    page.locator(".play").click()
    page.wait_for_selector(f".explorer[data-shown='{LEVELS - 1}']")
    page.wait_for_function("document.querySelector('.play').textContent === 'Play'")


def test_charts_answer_pointer_and_keys(opened):
    page = opened()
    chart, tip = page.locator("svg[data-points]").nth(1), page.locator("#tip")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert tip.is_hidden()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.5 * box["height"])
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert "training step" in tip.text_content()
    first = tip.text_content()
    page.keyboard.press("ArrowRight")
    assert tip.text_content() != first
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    mark = page.locator("svg[data-points]").nth(2).locator(".mark").first
    mark.hover(force=True)
    assert "GFLOPs per image" in tip.text_content()


def test_theme_follows_the_system_until_it_is_switched(opened):
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = opened(), opened(scheme="dark")
    bright, black = light.evaluate(colour), dark.evaluate(colour)
    assert bright != black
    for _ in range(2):  # light, then dark
        light.locator("#theme").click()
    assert light.evaluate(colour) == black
    dark.locator("#theme").click()
    assert dark.evaluate(colour) == bright


@pytest.mark.parametrize("width", [360, 1200])
def test_pages_fit_and_no_text_of_a_chart_covers_another(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERLAPS) == []
    assert page.locator(".slider").bounding_box()["width"] > 60
