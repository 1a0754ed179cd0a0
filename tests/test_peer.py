"""`make peer` notices tests that pass on plain models and fail on wrapped ones, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).with_name("peer")
MODEL = """
import os
import pytest
import torch
from diffusers import DiTTransformer2DModel, TransformerTemporalModel

@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=3, sample_size=8, norm_num_groups=1
    ).eval()

def call(model):
    with torch.no_grad():
        return model(torch.ones(1, 2, 8, 8), timestep=torch.tensor([500]), class_labels=torch.tensor([1])).sample
"""
STEADY = """
def test_that_fails_anyway(model):
    assert call(model).shape == ()

def test_of_the_shape(model):
    assert call(model).shape == (1, 2, 8, 8)

@pytest.mark.parametrize("block", [0, 1])
def test_that_a_block_runs(model, block):
    ran = []
    model.transformer_blocks[block].register_forward_hook(lambda *_: ran.append(block))
    call(model)
    assert ran == [block]

def test_of_a_class_that_is_refused():
    TransformerTemporalModel(num_attention_heads=1, attention_head_dim=4, in_channels=4, norm_num_groups=1)
"""
HURT = """
def test_before(model):
    assert call(model).isfinite().all()

def test_that_ends_the_process(model):
    if hasattr(model, "tokdyn") and model.tokdyn.methods:
        os.abort()

def test_of_the_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(call(loaded), call(model))
    assert type(loaded) is DiTTransformer2DModel
"""
EXPECTED = """
[[lost]]
test = "*/test_steady.py::test_that_a_block_runs"
reason = "it counts the blocks that run"
"""
FOLDER = "tests/models/transformers"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Write a checkout with two files of tests; return its folder."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for name, text in (
        ("conftest.py", ""),
        ("models/transformers/test_steady.py", MODEL + STEADY),
        ("models/transformers/test_hurt.py", MODEL + HURT),
    ):
        (tmp_path / "tests" / name).write_text(text)
    (tmp_path / "expected.toml").write_text(EXPECTED)
    return tmp_path


def peer(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = ["--store", checkout / "store", "--expected", checkout / "expected.toml", "--out", checkout / "report"]
    command = [sys.executable, TOOL, checkout, *words, *settings]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def lost(checkout: Path, name: str) -> dict[str, Any]:
    """Return the names of the tests that a file lost, by setting, from the report."""
    files = json.loads((checkout / "report.json").read_text())["files"]
    (found,) = [each for each in files if Path(each["file"]).name == name]
    return {setting: [test.split("::")[-1] for test in tests] for setting, tests in found["lost"].items()}


@pytest.mark.slow
def test_lost_tests_are_noticed_and_finished_files_are_not_run_again(checkout: Path) -> None:
    done = peer(checkout, "--jobs", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    hurt, acting = ["test_that_ends_the_process", "test_of_the_class"], ["test_that_a_block_runs[1]"]
    assert lost(checkout, "test_hurt.py") == {"empty": ["test_of_the_class"], "never": hurt, "acting": hurt}
    assert lost(checkout, "test_steady.py") == {"empty": [], "never": [], "acting": acting}

    (checkout / FOLDER / "conftest.py").write_text("raise RuntimeError('this is run again')")
    again = peer(checkout, f"{FOLDER}/test_steady.py")
    assert again.returncode == 0, again.stdout + again.stderr  # what it lost is expected
    assert lost(checkout, "test_steady.py") == {"empty": [], "never": [], "acting": acting}
    report = (checkout / "report.md").read_text()
    assert "| models/transformers/test_steady.py | 4 | 0 | 0 | 1 | 0 | DiTTransformer2DModel: " in report
    assert "it counts the blocks that run" in report

    known = peer(checkout, "--known", "--results", str(checkout / "results.md"))
    assert known.returncode == 1, known.stdout + known.stderr  # what the other file lost is not expected
    results = (checkout / "results.md").read_text()
    assert "| models/transformers/test_steady.py | 4 | 0 | 0 | 1 | 0 | DiTTransformer2DModel: " in results
    assert "| TransformerTemporalModel | 2 (1) |" in results
    assert "2. it counts the blocks that run" in results

    (checkout / "store" / "models.transformers.test_steady.json").unlink()  # as on a machine that ran the other file
    peer(checkout, "--known", "--results", str(checkout / "results.md"))
    assert (checkout / "results.md").read_text() == results


@pytest.mark.slow
def test_what_wraps_nothing_is_run_once_and_what_passes_wrapped_is_not_run_plain(checkout: Path) -> None:
    runs = checkout / "runs.txt"
    note = f"\n    open({str(runs)!r}, 'a').write('%s ')\n"
    text = MODEL + "def test_without_a_model():" + note % "alone" + "def test_with_one(model):" + note % "with"
    (checkout / FOLDER / "test_steady.py").write_text(text)
    done = peer(checkout, f"{FOLDER}/test_steady.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.read_text().split() == ["alone", "with", "with", "with"]  # an empty list, never acting, acting


@pytest.mark.parametrize("words", [(), ("tests/no_such_file.py",)], ids=["no checkout", "no file"])
def test_wrong_arguments_are_refused(tmp_path: Path, checkout: Path, words: tuple[str, ...]) -> None:
    where = checkout if words else tmp_path / "nowhere"
    done = peer(where, *words)
    assert done.returncode == 2
    assert str(where) in done.stderr
