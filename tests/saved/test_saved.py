"""Folders that earlier versions wrote are read, and give what they gave then."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.saved.formats import FORMATS, HERE, copied, expected, folders, layout, quietly, write_folder
from tokdyn.methods import METHODS

ROOT = Path(__file__).parents[2]
SAVED = [(name, folder.name) for name in FORMATS for folder in folders(name)]
READERS = {
    "tokdyn/attach/sidecar.py": "methods",
    "tokdyn/checkpoints/files.py": "models",
    "tokdyn/sample/loading.py": "training",
    "tokdyn/train/checkpoints.py": "training",
    "tokdyn/train/metrics.py": "training",
    "tokdyn/train/snapshot.py": "training",
    "tokdyn/bases/opening.py": "training",
    "tokdyn/recipe/from_base.py": "training",
    "tokdyn/upcycling/state.py": "distillation",
    "tokdyn/data/shards.py": "latents",
    "tokdyn/data/remote/latents.py": "latents",
    "tokdyn/data/tars/index.py": None,  # an index that is made anew where it does not fit
    "tokdyn/team.py": None,  # messages between the processes of one job
    "tokdyn/upcycling/dry_run.py": None,  # files of diffusers
    "tokdyn/data/digests.py": None,  # a cache that may be deleted
    "tokdyn/evaluate/statistics.py": "statistics",
    "tokdyn/recipe/files.py": "settings",
    "tokdyn/bench/stacks.py": "settings",
    "tokdyn/sample/identity.py": "samples",
    "tokdyn/bases/table.py": None,  # the base that ships with the package
    "tokdyn/bases/download.py": None,  # a download that was interrupted begins anew
    "tokdyn/upcycling/command.py": None,  # only compares settings.json, whose keys are those of the command
    "tokdyn/calibration/trajectories.py": None,  # a file of diffusers
    "tokdyn/bases/names.py": None,  # likewise
    "tokdyn/catalog.py": None,  # a table that ships with the package
    "tokdyn/sample/pipeline.py": None,  # pictures of other settings are refused, and so are those of another version
    "tokdyn/evaluate/timm_model.py": None,  # a file of timm
    "tokdyn/report/pareto.py": None,  # rows of anybody
    "tokdyn/run_report/folders.py": None,  # shows what it finds
    "tokdyn/demo/shipped.py": None,  # the description of a model that ships with the package
    "tokdyn/playground/words.py": None,  # words that were typed on the page
}
"""The format that a module reads; None where it is no format of ours."""
READING = {"json_object", "loads", "load_file", "safe_open", "parse", "parse_json", "read_json", "model_validate_json"}


@pytest.mark.parametrize(("name", "number"), SAVED)
def test_saved_folders_give_what_they_gave(name: str, number: str) -> None:
    folder = HERE / name / number
    with copied(folder) as copy:
        found = quietly(FORMATS[name].read, copy)
    for key, value in expected(folder).items():
        compare(f"{name} {number}: {key}", found[key], value)


def compare(what: str, found: Any, value: Any) -> None:
    """Compare what was read with what is expected; settings may have been added since."""
    if isinstance(value, Tensor):
        rounding = 1e-3 * float(value.abs().max())  # of other versions of torch; another format is off by far more
        torch.testing.assert_close(found, value, rtol=0, atol=rounding, msg=lambda text: f"{what}: {text}")
    elif isinstance(value, Mapping):
        assert value.keys() <= found.keys(), what
        for key, each in value.items():
            compare(f"{what}.{key}", found[key], each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        assert len(found) == len(value), what
        for place, each in enumerate(value):
            compare(f"{what}[{place}]", found[place], each)
    else:
        assert found == value, what


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_now_has_a_folder(name: str, tmp_path: Path) -> None:
    """A format that has changed needs a new folder, so that later versions read it too."""
    quietly(FORMATS[name].write, tmp_path)
    newest = folders(name)[-1:]
    assert newest, "run `python tests/saved/formats.py`"
    assert layout(tmp_path) == layout(newest[0]), (
        f"the format {name!r} has changed; if it is meant to, `python tests/saved/formats.py` writes a folder of it"
    )


def test_every_method_is_saved() -> None:
    given = [expected(folder) for folder in folders("methods")]
    assert {each for values in given for key in values if key.endswith(" names") for each in values[key]} == set(
        METHODS
    )


def test_no_folder_is_overwritten() -> None:
    folder = HERE / "statistics" / "1"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(FileExistsError):
        write_folder("statistics", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_every_module_that_reads_files_has_a_format() -> None:
    found = set()
    for path in sorted((ROOT / "tokdyn").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(call.func, "attr", getattr(call.func, "id", None)) if isinstance(call, ast.Call) else None
            if name in READING:
                found.add(path.relative_to(ROOT).as_posix())
    assert found - {"tokdyn/files.py", "tokdyn/reading.py", "tokdyn/recipe/yaml_text.py"} == set(READERS)
    assert {each for each in READERS.values() if each is not None} == set(FORMATS)
