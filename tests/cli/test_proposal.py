"""`tokdyn train photos/` proposes a recipe and the command, and runs it with --yes."""

from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokdyn.cli.main import app
from typer.testing import CliRunner

from tokdyn import recipe
from tokdyn.errors import DataError
from tokdyn.recipe.proposal import holds_images, propose


def run(*words: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def images(folder: Path, names: list[str], size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Path:
    """Write noise of (width, height)."""
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
    return folder


def settings(name: Path) -> dict[str, str]:
    return dict(each.split("=", 1) for each in propose(str(name)).settings)


def test_class_folders_and_sizes_are_read(tmp_path: Path) -> None:
    path = images(tmp_path / "my photos", ["cat/1.png", "cat/2.png", "dog/3.png"], size=(100, 41))
    found = propose(str(path))
    assert (found.images, found.width, found.height) == (3, 100, 41)
    assert found.classes == {"cat": 2, "dog": 1}
    resolved = recipe.load(found.recipe, found.settings)
    assert (resolved.data.kind, resolved.data.path, resolved.data.size) == ("images", str(path), 40)
    assert shlex.split(found.command) == ["tokdyn", "train", found.recipe, *found.settings]
    assert not resolved.data.size % resolved.model.overrides["patch_size"]


def test_large_images_are_scaled_down_and_grey_ones_stay_grey(tmp_path: Path) -> None:
    path = images(tmp_path / "grey", ["a.png", "b.png"], size=(300, 200), mode="L")
    given = settings(path)
    assert (given["data.size"], given["data.channels"]) == ("64", "1")
    assert propose(str(path)).classes == {"all": 2}


def test_images_beside_folders_form_one_class(tmp_path: Path) -> None:
    path = images(tmp_path / "mixed", ["a.png", "cat/b.png"])
    assert settings(path)["data.num_classes"] == "1"
    assert any("a.png" in note for note in propose(str(path)).notes)


def test_a_zip_of_one_folder_of_classes(tmp_path: Path) -> None:
    path = images(tmp_path / "set", ["cat/1.png", "dog/2.png"])
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for file in sorted(path.rglob("*.png")):
            archive.write(file, Path("set") / file.relative_to(path))
    found = propose(str(tmp_path / "mine.zip"))
    assert set(found.classes) == {"cat", "dog"}
    assert f"data.path={tmp_path / 'mine.zip'}/set" in found.settings


def test_unreadable_images_are_named_and_skipped(tmp_path: Path) -> None:
    path = images(tmp_path / "set", ["a.png"])
    (path / "b.png").write_bytes(b"no image")
    assert settings(path)["data.on_error"] == "skip"
    (path / "a.png").write_bytes(b"no image either")
    with pytest.raises(DataError, match=r"a\.png"):
        propose(str(path))


@pytest.mark.parametrize("name", ["photos #1", "1e3", "a: b", "true"])
def test_paths_that_yaml_reads_otherwise_are_quoted(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / name, ["a.png"])
    monkeypatch.chdir(tmp_path)
    found = propose(name)
    assert recipe.load(found.recipe, found.settings).data.path == name


def test_runs_and_recipes_are_not_taken_for_images(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text("{}")
    assert not any(map(holds_images, [str(tmp_path / "run"), str(tmp_path / "recipe.yaml"), str(tmp_path), "demo"]))


def test_the_proposal_is_shown_and_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = images(tmp_path / "set", [f"{name}/{index}.png" for name in "ab" for index in range(4)], size=(16, 16))
    monkeypatch.chdir(tmp_path)
    small = ["model.hidden_size=32", "model.depth=1", "training.steps=2", "training.batch_size=4"]
    small += ["training.sample_every=null", "training.precision=fp32"]
    shown = run("train", path, *small)
    assert "2 classes" in shown.stdout
    assert not (tmp_path / "runs").exists()
    line = shown.stderr.strip().splitlines()[-1].removeprefix("Next: ")
    assert shlex.split(line) == ["tokdyn", "train", str(path), *small, "--yes"]
    found = json.loads(run("train", path, *small, "--json").stdout)
    assert found["command"].startswith("tokdyn train demo data.kind=images")
    done = json.loads(run(*shlex.split(line)[1:], "--json").stdout)
    assert (done["step"], done["folder"]) == (2, "runs/set")
    assert "runs/set-2" in propose(str(path)).command  # the next run gets a folder of its own
    assert "run" in run("train", path, "--resume", code=2).stderr
