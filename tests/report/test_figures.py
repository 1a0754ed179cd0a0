"""Figures for papers: no text covers another, whatever the points and names are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.report.test_maps import record
from tokdyn.report.gallery import Column
from tokdyn.report.maps import draw_maps
from tokdyn.report.panels import draw_bars, draw_curves, draw_side_by_side
from tokdyn.report.pareto import ParetoPoint, draw_pareto
from tokdyn.report.pixels import to_pixels
from tokdyn.report.trajectory import Trajectory, draw_trajectory


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as they are."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **settings: object) -> None:
        save(figure, *args, **settings)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """The texts of a figure that cover each other."""
    figure.draw_without_rendering()
    unseen = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside = (tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high)
        unseen.update(label for tick in outside for label in (tick.label1, tick.label2))
    texts = [each for each in figure.findobj(Text) if each.get_text().strip() and each.get_visible()]
    texts = [each for each in texts if each not in unseen]
    boxes = [(each.get_text(), each.get_window_extent()) for each in texts]
    return [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.padded(-0.5).overlaps(other)]


def points(count: int, spread: float) -> list[ParetoPoint]:
    random = np.random.default_rng(0)
    return [
        ParetoPoint(series=f"run {place % 3}", label=f"stack {place}", cost=5 + spread * x, quality=9 + spread * y)
        for place, (x, y) in enumerate(random.random((count, 2)))
    ]


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize(("count", "spread"), [(3, 1.0), (8, 1.0), (6, 1e-3)])
def test_labels_of_points_do_not_overlap(tmp_path: Path, drawn: list[Figure], count: int, spread: float, column: bool):
    made = points(count, spread) + points(1, 1.0)[:1]
    draw_pareto(made, tmp_path / "p.png", "GFLOPs per image", "distance", note="on this machine", column=column)
    shown = [each.get_text() for each in drawn[0].findobj(Text)]
    assert overlapping(drawn[0]) == []
    assert sum(text.startswith("stack") for text in shown) >= min(len(made), 3)


def test_more_labels_than_there_is_room_for_are_left_out(tmp_path: Path, drawn: list[Figure]):
    draw_pareto(points(80, 1.0), tmp_path / "p.png", "GFLOPs per image", "distance", column=True)
    shown = [each.get_text() for each in drawn[0].findobj(Text) if each.get_text().startswith("stack")]
    assert overlapping(drawn[0]) == []
    assert 5 < len(shown) < 80


def maps(path: Path) -> Path:
    finals = to_pixels(torch.zeros(3, 3, 8, 12))
    names = ["great white shark, man-eater", "star", "日本"]
    return draw_maps(record(images=3, frames=4).maps(), finals, to_pixels, path, names, column=True)


def trajectory(path: Path) -> Path:
    levels = np.linspace(1, 0, 7)
    shares = np.tile(np.linspace(0.2, 0.7, 7)[:, None], (1, 4))
    made = [Trajectory(f"tail drop {drop}", levels, shares, 0.5 * shares, 10 * levels) for drop in (0, 0.3, 0.6)]
    return draw_trajectory(made, path, column=True)


def side_by_side(path: Path) -> Path:
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    columns = [
        Column(f"tail drop {drop}", ["100.0% kept", "9.759 GFLOPs", "1808.2 ms"], [image] * 2) for drop in range(4)
    ]
    return draw_side_by_side(columns, ["a class with a long name", "star"], path)


def curves(path: Path) -> Path:
    return draw_curves({f"run {n}": (range(0, 60000, 500), np.linspace(1, n, 120)) for n in range(4)}, "loss", path)


def parts(path: Path) -> Path:
    rows = {"shapes/a-run-with-a-long-name": {f"part {n}": 1.0 + n for n in range(8)}, "b": {"part 1": 0.5}}
    return draw_bars(rows, "GFLOPs per step and image", path)


@pytest.mark.parametrize("drawer", [maps, trajectory, side_by_side, curves, parts])
def test_figures_fit_a_column_and_their_texts_do_not_overlap(
    tmp_path: Path, drawn: list[Figure], drawer: Callable[[Path], Path]
):
    drawer(tmp_path / "f.png")
    figure = drawn[0]
    assert figure.get_figwidth() <= 3.5
    assert overlapping(figure) == []
    assert min(each.get_fontsize() for each in figure.findobj(Text) if each.get_text()) >= 6


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (8, 8), (4, 12)])
def test_names_of_maps_are_whole(tmp_path: Path, drawn: list[Figure], size: tuple[int, int], column: bool) -> None:
    names = ["crescent", "automobile", "golden retriever"]
    finals = to_pixels(torch.zeros(3, 3, *size))
    draw_maps(record(images=3, frames=6).maps(), finals, to_pixels, tmp_path / "m.png", names, column=column)
    shown = [each.get_text().replace("\n", " ") for each in drawn[0].findobj(Text)]
    assert set(names[:2]) <= set(shown)
    assert names[2] in shown or size[0] < 8  # low rows have room for one line
    assert overlapping(drawn[0]) == []


@pytest.mark.parametrize("kind", ["svg", "pdf"])
def test_text_of_vector_formats_stays_text(tmp_path: Path, kind: str):
    content = curves(tmp_path / f"f.{kind}").read_bytes()
    assert b"training step" in content if kind == "svg" else b"/Font" in content and b"/Type3" not in content
