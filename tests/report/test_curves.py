"""Curves: step records become trajectories, rows of JSON become points, and both are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokdyn.diffusion.records import KeptCounts, StepRecord
from tokdyn.errors import DataError, InputError
from tokdyn.report.pareto import ParetoPoint, draw_pareto, frontier, read_points
from tokdyn.report.trajectory import draw_trajectory, join_batches


def records(batch: int, guided: list[bool], seconds: float, routed: bool = True) -> list[StepRecord]:
    made = []
    for index, both in enumerate(guided):
        cond = torch.arange(batch) + 10 + index
        counts = KeptCounts(40, cond, cond // 5 if both else None) if routed else None
        made.append(StepRecord(index, 900.0 - index, 0.9 - 0.1 * index, both, seconds, counts))
    return made


def test_batches_are_joined():
    guided = [True, False, True]
    joined = join_batches("x", [records(3, guided, 0.3), records(2, guided, 0.2)], images=5)
    np.testing.assert_allclose(joined.level, [0.9, 0.8, 0.7])
    np.testing.assert_allclose(joined.milliseconds, [100.0] * 3)
    np.testing.assert_allclose(joined.cond[1], np.array([11, 12, 13, 11, 12]) / 40)
    np.testing.assert_allclose(joined.uncond[0], np.array([2, 2, 2, 2, 2]) / 40)
    assert np.isnan(joined.uncond[1]).all()


def test_models_without_routing_have_only_times():
    joined = join_batches("x", [records(3, [True, True], 0.3, routed=False)], images=3)
    assert joined.cond is None
    assert joined.uncond is None


def test_trajectories_without_guidance_have_one_branch():
    assert join_batches("x", [records(3, [False, False], 0.3)], images=3).uncond is None


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("guided", [[True, False, True], [False] * 3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_trajectories_are_drawn(tmp_path, routed, guided, count, suffix):
    trajectories = [join_batches(f"tail drop {n}", [records(3, guided, 0.3, routed)], 3) for n in range(count)]
    path = draw_trajectory(trajectories, tmp_path / f"t.{suffix}")
    assert path.stat().st_size > 5000
    if suffix == "svg":
        text = path.read_text()
        assert "noise level" in text
        assert "[ms]" in text
        assert ("tokens kept" in text) == routed
        assert ("without class" in text) == (routed and any(guided))
        assert ("tail drop 1" in text) == (count > 1)


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(InputError, match="record"):
        join_batches("x", [], 0)
    with pytest.raises(InputError, match="trajector"):
        draw_trajectory([], tmp_path / "t.png")
    with pytest.raises(InputError, match="point"):
        draw_pareto([], tmp_path / "p.png", "cost", "quality")


numbers = st.integers(0, 8).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), st.booleans())
def test_the_frontier_is_every_point_that_no_other_one_beats(values, higher):
    points = [ParetoPoint(series="s", cost=cost, quality=quality) for cost, quality in values]
    sign = -1 if higher else 1

    def beaten(point: ParetoPoint) -> bool:
        better = ((o.cost - point.cost, sign * (o.quality - point.quality)) for o in points)
        return any(c <= 0 and q <= 0 and (c < 0 or q < 0) for c, q in better)

    expected = {(point.cost, point.quality) for point in points if not beaten(point)}
    optimal = frontier(points, higher)
    assert [(p.cost, p.quality) for p in optimal] == sorted(expected)


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_points_are_read_from_rows(tmp_path):
    rows = [
        {"model": "DiT", "flops": 1.5, "values": {"frechet_distance[x]": 20}},
        {"model": "DC-DiT", "flops": 1, "values": {"frechet_distance[x]": 18.5}, "label": 0.3},
    ]
    for content in (rows, {"machine": "m", "rows": rows}):
        points = read_points(write(tmp_path / "r.json", content), "flops", "values.frechet_distance[x]")
        assert points == [
            ParetoPoint(series="DiT", cost=1.5, quality=20),
            ParetoPoint(series="DC-DiT", label="0.3", cost=1, quality=18.5),
        ]


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({"a": 1}, "r\\.json.*rows"),
        ([], "r\\.json.*rows"),
        ([{"model": "a", "cost": "much", "fid": 1}], "row 0 .*'cost'.*cost, fid, model"),
        ([{"model": "a", "cost": 1}], "row 0 .*'fid'.*cost, model"),
        ([{"cost": 1, "fid": 1}], "row 0 .*'model'.*cost, fid"),
    ],
)
def test_rows_that_cannot_be_drawn_are_named(tmp_path, content, values):
    with pytest.raises(DataError, match=values):
        read_points(write(tmp_path / "r.json", content), "cost", "fid")


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json"):
        read_points(tmp_path / "none.json", "cost", "fid")


def test_pareto_plot_names_its_series_axes_and_points(tmp_path):
    points = [
        ParetoPoint(series="DiT", cost=1, quality=20),
        ParetoPoint(series="DC-DiT", label="rho 0.6", cost=1.2, quality=15),
        ParetoPoint(series="DC-DiT", label="rho 0", cost=2, quality=12),
    ]
    text = draw_pareto(points, tmp_path / "p.svg", "GFLOPs per image", "FID", note="on this machine").read_text()
    for word in ("DiT", "DC-DiT", "rho 0.6", "GFLOPs per image", "FID", "lower is better", "on this machine"):
        assert word in text
