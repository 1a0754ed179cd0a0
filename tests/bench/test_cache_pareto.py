"""`benchmarks.cache_pareto` measures every rule with every companion, and continues when it is repeated."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb

from benchmarks import cache_pareto, cache_pareto_picture
from tests.evaluate.conftest import Kit
from tests.sampling import FACTS, png, tiny
from tokdyn import DiT
from tokdyn.train.snapshot import save_model

RULES = (cache_pareto.NO_CACHE, *cache_pareto.LISTED, *cache_pareto.DECIDED)


def test_search_meets_the_share_or_comes_nearest() -> None:
    def smooth(threshold: float) -> float:
        return 1 / (1 + 7 * threshold)

    threshold, share = cache_pareto.search(smooth, 0.6, tolerance=0.01)
    assert share == smooth(threshold) == pytest.approx(0.6, abs=0.01)
    threshold, share = cache_pareto.search(lambda each: 0.75 if each < 0.3 else 0.4, 0.6, tolerance=0.01)
    assert (threshold < 0.3, share) == (True, 0.75)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 1.0])
def test_listed_steps_are_spaced_evenly_from_the_first_to_the_last(share: float) -> None:
    steps = cache_pareto.spaced(20, share)
    assert (steps[0], steps[-1], len(steps)) == (0, 19, max(2, 20 * share))
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1


def small(name: str, rule: str, companion: str, budget: float, place: int) -> dict[str, Any]:
    first = place == 0
    return {
        "name": name, "rule": rule, "companion": companion, "budget": budget, "computed": budget, "model": "dit",
        "tflops_per_image": (20 - place) / 1e3, "milliseconds": 100.0 - place, "psnr": None if first else 30.0 - place,
        "feature_distance": None if first else place / 100, "values": {"frechet_distance[judge]": 10.0 + place},
    }  # fmt: skip


def small_result() -> dict[str, Any]:
    """One budget of every rule, with every companion; each row costs less and is worse than the one before."""
    rows: list[dict[str, Any]] = []
    for rule in RULES:
        for companion in cache_pareto.COMPANIONS:
            budget = 1.0 if rule == cache_pareto.NO_CACHE else 0.5
            rows.append(small(f"{rule} {companion}", rule, companion, budget, len(rows) // 3))
    settings = {"count": 8, "steps": 20, "scheduler": "dpm", "guidance": 1.5, "precision": "fp32"}
    return {"quality": "frechet_distance[judge]", "settings": settings, "rows": rows}


def test_table_has_a_line_for_each_rule_with_the_values_of_all_companions() -> None:
    content = small_result()
    content["rows"][4] |= {"milliseconds": 71.23, "psnr": "inf"}
    head, _, *lines = cache_pareto.table(content).splitlines()
    assert len(lines) == len(RULES)
    assert head.endswith("| frechet_distance[judge] |")
    assert lines[1] == (
        "| listed steps | 50.0% | 19.0 / 19.0 / 19.0 | 99.0 / 71.2 / 99.0 | 29.0 / inf / 29.0 | 0.010 / 0.010 / 0.010 "
        "| 11.00 / 11.00 / 11.00 |"
    )


def test_picture_shows_every_rule_in_a_colour_of_its_own(tmp_path: Path) -> None:
    content = small_result()
    image = torch.from_numpy(png(cache_pareto_picture.draw(content, tmp_path / "all.png"))[..., :3].copy())
    inks = [torch.tensor([round(255 * part) for part in to_rgb(ink)]) for ink in cache_pareto_picture.INKS]
    assert len({tuple(ink.tolist()) for ink in inks}) == len(RULES)
    counts = [int((image == ink).all(-1).sum()) for ink in inks]
    assert min(counts) > 100
    moved = content | {"rows": [row for row in content["rows"] if row["rule"] != "MagCache"]}
    image = torch.from_numpy(png(cache_pareto_picture.draw(moved, tmp_path / "less.png"))[..., :3].copy())
    assert int((image == inks[-1]).all(-1).sum()) == 0


@pytest.mark.slow
def test_command_measures_every_rule_and_continues_when_repeated(tmp_path: Path) -> None:
    save_model(tiny(0, DiT, depth=4, sample_size=8, patch_size=2), tmp_path / "dit", FACTS)
    kit = Kit(tmp_path)
    files = {f"{number % 4}/{number}.png": image for number, image in enumerate(kit.draw(12, seed=1, side=8))}
    words = [
        str(tmp_path / "dit"), "--reference", str(kit.tree("test", files)), "--judge", str(kit.torchscript("judge")),
        "--count", "4", "--steps", "10", "--budgets", "0.5", "--searched", "4", "--timed", "2", "--rounds", "1",
        "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json"), "--figures", str(tmp_path / "figures"),
        "--threads", "1",
    ]  # fmt: skip
    assert cache_pareto.main(words) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 * len(RULES)
    dense = rows["no cache"]
    for rule in RULES[1:]:
        alone, merged, skipped = (rows[f"{rule}, 50%{more}"] for more in ("", " + TokenMerge", " + DepthSkip"))
        assert 0.3 <= alone["computed"] <= 0.7
        assert alone["tflops_per_image"] < 0.8 * dense["tflops_per_image"]
        assert max(merged["tflops_per_image"], skipped["tflops_per_image"]) < alone["tflops_per_image"]
        assert [alone["methods"], merged["methods"], skipped["methods"]] == [
            ["FeatureCache"], ["FeatureCache", "TokenMerge"], ["FeatureCache", "DepthSkip"],
        ]  # fmt: skip
    assert (tmp_path / "figures/cifar10-cache-pareto.png").is_file()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("work/**/images/**/*.png")}
    assert len(kept) == 4 * len(rows)
    assert cache_pareto.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("work/**/images/**/*.png")} == kept
    again = json.loads((tmp_path / "out.json").read_text())
    assert [(row["settings"], row["values"]) for row in again["rows"]] == [
        (row["settings"], row["values"]) for row in result["rows"]
    ]
    with pytest.raises(SystemExit, match="steps=10"):
        cache_pareto.main([*words, "--steps", "12"])


def test_command_asks_for_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cache_pareto.main(["runs/dit"])
    assert "--judge" in capsys.readouterr().err
