"""`tokdyn report` and `tokdyn plot` on a tiny run: what is sampled, what is read, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tests.sampling import FACTS, QUICK, tiny
from tokdyn import DiT
from tokdyn.run_report.build import gather
from tokdyn.run_report.folders import read_folder
from tokdyn.run_report.settings import ReportConfig
from tokdyn.sample import SampleConfig, sample
from tokdyn.train.snapshot import save_model

NAME = "<script>window.hacked = 1</script>"
SHORT = {**QUICK, "count": 3, "batch_size": 2, "tail_drop": (0.0, 0.5)}
WORDS = [f"{name}={','.join(map(str, value)) if name == 'tail_drop' else value}" for name, value in SHORT.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a hostile name and damaged metrics, and a run that computes every token."""
    place = tmp_path_factory.mktemp("report")
    save_model(tiny(0), place / "run" / "model", {**FACTS, "name": NAME})
    (place / "run" / "recipe.yaml").write_text(f"name: {NAME}\ndescription: </pre>{NAME}\n")
    rows = [{"step": step, "loss": 1.0 / step, "kept": 0.25, "note": NAME} for step in range(1, 9)]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 9, "loss": NaN}\n[]\n{"step": 10, "lo'
    (place / "run" / "metrics.jsonl").write_text(text)
    save_model(tiny(1, DiT), place / "dit", FACTS)
    return place / "run", place / "dit"


def run(*words: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_budgets_are_those_of_sampling_from_the_same_seeds(folders, tmp_path):
    (found,) = gather(ReportConfig(**SHORT), [str(folders[0])])
    same = SampleConfig(model=str(folders[0]), out=tmp_path, tail_drop=(0.0, 0.5), format="npz", count=3, **QUICK)
    budgets = sample(same).budgets
    assert [budget.kept for budget in found.sampled.budgets] == pytest.approx([budget.kept for budget in budgets])
    gflops = [1e3 * budget.tflops_per_image for budget in budgets]
    assert [budget.gflops for budget in found.sampled.budgets] == pytest.approx(gflops)
    for budget, drop in zip(found.sampled.budgets, ("0", "0.5"), strict=True):
        images = np.load(tmp_path / f"tail_drop_{drop}" / "samples.npz")["arr_0"]
        assert np.abs(budget.images.astype(int) - images).max() <= 1  # batches of another size round differently
    assert [budget.psnr is None for budget in found.sampled.budgets] == [True, False]


def test_frames_and_parts_are_those_of_the_largest_budget(folders):
    (found,) = gather(ReportConfig(**{**SHORT, "map_images": 2}), [str(folders[0])])
    sampled = found.sampled
    assert len(sampled.frames) == QUICK["steps"]
    assert all(frame.pictures.shape == (2, 6, 8, 3) and frame.keep.shape == (2, 6, 8) for frame in sampled.frames)
    shares = [frame.keep.mean(axis=(1, 2)) for frame in sampled.frames]
    np.testing.assert_allclose(shares, sampled.budgets[0].trajectory.cond[:, :2])
    levels = [frame.level for frame in sampled.frames]
    assert levels == sorted(levels, reverse=True)
    names = {part.name for part in sampled.parts}
    assert {"encoder", "router and chunking", "blocks", "decoder", "head"} <= names
    assert all(part.milliseconds > 0 for part in sampled.parts if part.name != "methods")


def test_page_compares_runs_and_cannot_be_made_to_run_their_names(folders, tmp_path):
    quality = tmp_path / "measured"
    quality.mkdir()
    rows = [{"name": f"{NAME} {n}", "tflops_per_image": 1 + n, "values": {"fid": 9 - n}} for n in range(3)]
    (quality / "quality.json").write_text(json.dumps({"quality": "fid", "rows": rows, "units": NAME}))
    out = tmp_path / "deep" / "r.html"
    shown = run("report", *folders, quality, *WORDS, f"out={out}")
    assert str(out) in shown
    page = out.read_text()
    assert NAME not in page
    assert "&lt;script&gt;window.hacked" in page
    assert page.count("<script>") == 1
    for text in (
        "tiny/run",
        "apple",
        "GFLOPs",
        "tail drop 0.5",
        "fid (lower is better)",
        "Training loss",
        "recipe.yaml",
    ):
        assert text in page, text
    assert page.count('class="explorer"') == 1  # the DiT computes every token
    assert [path.name for path in out.parent.iterdir()] == ["r.html"]


def test_two_runs_of_one_name_are_told_apart(folders):
    found = gather(ReportConfig(**{**SHORT, "count": 1}), [str(folders[1]), str(folders[1])])
    assert len({each.name for each in found}) == 2


def test_figures_are_drawn_in_every_format(folders, tmp_path):
    shown = json.loads(run("plot", *folders, *WORDS, f"out={tmp_path / 'f'}", "formats=svg,pdf", "--json"))
    names = {re.sub(r"(-\d.*)?\.(svg|pdf)$", "", Path(path).name) for path in shown["files"]}
    assert names == {
        "budgets", "maps", "trajectory", "flops-by-part", "time-by-part", "training-loss", "training-kept", "similarity"
    }  # fmt: skip
    assert {Path(path).suffix for path in shown["files"]} == {".svg", ".pdf"}
    assert all(Path(path).stat().st_size > 1000 for path in shown["files"])


def test_everything_is_opened_before_the_first_is_sampled(folders, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "quality.json").write_text("{")
    for words, named in (
        ([folders[0], tmp_path / "nowhere"], "nowhere"),
        ([folders[0], tmp_path / "broken"], "broken"),
        ([folders[0], "tail_drop=0,0"], "tail_drop"),
        ([folders[0], "out=page.png"], "page.png"),
    ):
        refused = run("report", *words, *([] if "out=page.png" in words else [f"out={tmp_path / 'r.html'}"]), code=2)
        assert named in refused
    assert not (tmp_path / "r.html").exists()


def test_damaged_lines_of_metrics_are_left_out(folders):
    folder = read_folder(folders[0])
    assert len([row for row in folder.metrics if "loss" in row]) == 8
    assert folder.holds_model
