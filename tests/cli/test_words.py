"""Words are read before libraries are loaded, and a wrong one ends in a sentence that helps."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tests.test_imports import MODEL_CODE, loaded_after

WRONG = {
    "train demoo": "'demo'",
    "train demo optimizer.lrr=1": "'optimizer.lrr'",
    "train demo model.dpeth=3": "'depth'",
    "train demo kind=images": "data.kind=images",
    "train demo --yes": "--yes",
    "sample nowhere": "'nowhere'",
    "sample shapse": "'shapes'",
    "sample shapes stesp=3": "'steps'",
    "sample DiT-S/2": "model.kind=dit model.name=S/2",
    "sample DC-DiT-B": "model.kind=dcdit model.name=B",
    "calibrate nowhere method=cache": "'nowhere'",
    "calibrate shapes method=skp": "'skip'",
    "calibrate DC-DiT-B method=cache": "DC-DiT-B",
    "tune nowhere flops=0.5": "'nowhere'",
    "tune DiT-B/4 flops=0.5": "DiT-B/4",
    "bench flops nowhere": "'nowhere'",
    "bench speed nowhere": "'nowhere'",
    "bench quality DiT-S/2": "DiT-S/2",
    "eval nowhere": "nowhere",
    "features nowhere vae=x out=y": "nowhere",
    "convert nowhere x to=tokdyn": "'nowhere'",
    "convert DC-DiT-L x to=tokdyn": "DC-DiT-L",
    "upcycle --base shapse": "'shapes'",
    "upcycle --base DiT-S/2": "DiT-S/2",
    "upcycle --method nope": "nope",
    "methods TokenMrge": "'TokenMerge'",
    "playground nowhere": "'nowhere'",
    "playground shapes stesp=3": "'steps'",
    "playground shapes port=0": "port",
    "models sampel_size=3": "'sample_size'",
    "recipes show demoo": "'demo'",
    "presets FLUXX.1-dev": "'FLUX.1-dev'",
    "presets nowhere.yaml": "nowhere.yaml",
    "presets flux x=1": "x=1",
    "bench speed DiT-S/2 --stack '{name: a, methods: [{method: TokenMrge}]}'": "'TokenMerge'",
    "bench flops --stack '{name: a, model: nowhere}'": "'nowhere'",
    "bench flops --stack '{nmae: a}'": "'name'",
    "bench flops --stack nowhere.yaml": "nowhere.yaml",
    "bench quality shapes --stack '{name: a, methods: [{method: merge, ratoi: 0.3}]}'": "'ratio'",
    "upcycle --recipe shapes/upcylce": "'shapes/upcycle'",
    "upcycle trainnig.steps=3": "'training'",
    "upcycle --base shapes chunking.budget_warmup=3": "'budget_warmup_steps'",
    "upcycle --method mrge=0.2": "merge=RATIO",
    "report nowhere": "nowhere",
    "report . cuont=3": "'count'",
    "plot . formts=pdf": "'formats'",
    "doctor x=1": "x=1",
    "tune shapes flops=0.5 knobs=mrge": "'merge'",
}


def run(*words: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words_end_in_a_sentence_with_a_way_out(words: str) -> None:
    result = run(*shlex.split(words), code=2)
    assert WRONG[words] in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 400
    assert result.stdout == ""


def test_no_libraries_are_loaded_for_words() -> None:
    """One interpreter for all of them, because each takes a second."""
    statements = [
        "from typer.testing import CliRunner",
        "from tokdyn.cli.main import app",
        *(f"assert CliRunner().invoke(app, {shlex.split(words)}).exit_code == 2" for words in WRONG),
        *(f"assert CliRunner().invoke(app, {words}).exit_code == 0" for words in (["recipes", "ls"], ["train", "-h"])),
    ]
    assert not loaded_after("; ".join(statements)) & (MODEL_CODE | {"torch", "matplotlib", "huggingface_hub"})


def test_devices_that_are_named_exist() -> None:
    shown = run("sample", "shapes", "device=meta9", code=2).stderr
    assert "device=cpu" in shown
    assert ("device=cuda" in shown) == torch.cuda.is_available()


def test_what_is_no_recipe_is_said(tmp_path: Path) -> None:
    binary, empty = tmp_path / "weights.bin", tmp_path / "empty.zip"
    binary.write_bytes(bytes(range(256)))
    zipfile.ZipFile(empty, "w").close()
    assert "YAML" in run("train", binary, code=2).stderr
    assert "empty.zip holds no images" in run("train", empty, code=2).stderr
    (tmp_path / "folder").mkdir()
    assert "folder holds no images" in run("train", tmp_path / "folder", code=2).stderr


UNWRITABLE = [
    "train demo out=FILE/deep",
    "upcycle --recipe shapes/upcycle out=FILE",
    "report RUN out=FILE/deep/report.html",
    "plot RUN out=FILE",
    "bench flops shapes csv=FILE/deep/x.csv",
    "bench flops shapes plot=FILE/deep/x.png",
    "bench speed shapes out=FILE/deep/x.json",
    "recipes copy demo FILE/deep/x.yaml",
]


@pytest.mark.parametrize("words", UNWRITABLE)
def test_places_that_cannot_be_written_are_refused_before_work_begins(words: str, saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("no folder\n")
    before = sorted(tmp_path.rglob("*"))
    result = run(*words.replace("FILE", str(file)).replace("RUN", str(saved)).split(), code=2)
    assert str(file) in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["report", "plot", "sample", "upcycle --base", "train --resume"])
def test_what_is_no_model_is_said(command: str, tmp_path: Path) -> None:
    """Not that data are missing, or that an empty folder holds images."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello\n")
    for name in ("empty", "notes.txt"):
        result = run(*command.split(), tmp_path / name, code=2)
        assert name in result.stderr
        assert "path" not in result.stderr.replace(str(tmp_path), "")
        assert result.stderr.count("\n") == 1


def test_a_run_that_is_not_there_cannot_be_resumed() -> None:
    assert "no run to resume in runs/nowhere" in run("upcycle", "out=runs/nowhere", "--resume", code=2).stderr


def test_a_damaged_model_is_refused_in_a_sentence(saved: Path, tmp_path: Path) -> None:
    weights = next(saved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    for words in (["report", saved], ["plot", saved, f"out={tmp_path / 'figures'}"], ["sample", saved, "steps=2"]):
        result = run(*words, code=2)
        assert str(saved) in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "figures").exists()
