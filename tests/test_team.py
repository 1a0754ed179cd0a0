"""Jobs that processes share: the same files and measurements as in one process, one report, and an end for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluate.conftest import Kit
from tests.processes import launch
from tests.sampling import FACTS, tiny
from tests.team_worker import work
from tokdyn.data import DataConfig
from tokdyn.sample.rounds import batches_of
from tokdyn.team import ALONE, Team
from tokdyn.train.snapshot import save_model

TIMED = {"seconds", "milliseconds", "images_per_second", "spread", "time_saved", "machine"}


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a judge, images of one size, and images of several sizes of which one is broken."""
    folder = tmp_path_factory.mktemp("team")
    facts = {**FACTS, "data": DataConfig(kind="images", size=16, num_classes=4).model_dump(mode="json")}
    save_model(tiny(0, depth=2, sample_size=16), folder / "dc", facts)
    kit = Kit(folder)
    kit.torchscript("judge")
    kit.tree("test", {f"{number % 4}/{number:03}.png": kit.draw(1, number, side=16)[0] for number in range(210)})
    sides = np.random.default_rng(0).integers(1, 4, 29) * 2
    kit.tree("mixed", {f"{place:02}.png": kit.draw(1, place, side=int(side))[0] for place, side in enumerate(sides)})
    (folder / "mixed" / "11.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def both(top: Path) -> tuple[Path, Path]:
    """What one process has made, and what two have made together."""
    launch(Path(__file__).parent / "team_worker.py", str(top), timeout=600)
    (top / "one").mkdir()
    work(top, top / "one", ALONE)
    return top / "one", top / "two"


def untimed(value: Any, folder: Path) -> Any:
    """Leave out times and the machine, and write paths in the folder as paths in FOLDER."""
    if isinstance(value, dict):
        return {name: untimed(each, folder) for name, each in value.items() if name not in TIMED}
    if isinstance(value, list):
        return [untimed(each, folder) for each in value]
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) else value


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(both: tuple[Path, Path]) -> None:
    """Byte for byte, but for times."""
    found = []
    for folder in both:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        content: dict[str, Any] = {}
        for name, path in files.items():
            if path.suffix == ".json":
                content[name] = json.dumps(untimed(json.loads(path.read_text()), folder))
            elif path.name not in ("trajectory.png", "quality.html"):  # they show times
                content[name] = path.read_bytes()
        found.append({name: each for name, each in content.items() if not name.startswith(("result_", "refused_"))})
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    suffixes = {Path(name).suffix for name in found[0]}
    assert {".png", ".npz", ".safetensors", ".json"} <= suffixes
    assert (both[1] / "grids" / "trajectory.png").is_file()


def test_both_processes_return_what_one_returns(both: tuple[Path, Path]) -> None:
    one, *two = (
        json.dumps(untimed(json.loads((folder / f"result_{rank}.json").read_text()), folder))
        for folder, rank in [(both[0], 0), (both[1], 0), (both[1], 1)]
    )
    assert two == [one, one]
    machine = json.loads((both[1] / "result_1.json").read_text())["npz"]["machine"]
    assert machine["processes"] == 2


def test_measurements_are_of_all_images(both: tuple[Path, Path]) -> None:
    result = json.loads((both[1] / "result_0.json").read_text())
    assert result["mixed"]["generated_images"] == 28
    assert result["mixed"]["warnings"][0].startswith("11.png")
    assert result["mixed"]["reference_images"] == 210
    assert [budget["measured"] for budget in result["grids"]["budgets"]] == [5, 5]
    assert all(row["held_out"] for row in result["quality"]["rows"][:2])


def test_several_processes_count_the_time_of_the_slowest(both: tuple[Path, Path]) -> None:
    """Five images in batches of two are two rounds of two processes, of which the second has one image."""
    budget = json.loads((both[1] / "npz" / "sample.json").read_text())["budgets"][0]
    sums = sum(step["milliseconds"] for step in budget["steps"]) * 5 / 1e3  # of both processes
    assert budget["seconds"] < sums
    assert budget["images_per_second"] == pytest.approx(5 / budget["seconds"])


def test_an_error_of_one_process_ends_both(both: tuple[Path, Path]) -> None:
    texts = [(both[1] / f"refused_{rank}.txt").read_text() for rank in range(2)]
    assert texts == ["Process 1 does not like it."] * 2


@given(st.lists(st.integers()), st.integers(1, 9))
def test_every_part_has_one_process(parts: list[int], count: int) -> None:
    teams = [Team(rank, count) for rank in range(count)]
    assert ALONE.in_order([team.share(parts) for team in teams][:1] if count == 1 else [parts]) == parts
    assert teams[0].in_order([team.share(parts) for team in teams]) == parts
    rounds = [list(team.rounds(parts)) for team in teams]
    assert len({len(each) for each in rounds}) == 1
    dealt = [part for together in zip(*rounds, strict=True) for part in together]
    assert dealt[: len(parts)] == parts
    assert all(part is None for part in dealt[len(parts) :])


@given(st.sets(st.integers(0, 99)), st.integers(1, 20))
def test_batches_do_not_depend_on_what_is_missing(missing: set[int], size: int) -> None:
    batches = batches_of(sorted(missing), size)
    assert [number for batch in batches for number in batch] == sorted(missing)
    whole = batches_of(range(100), size)
    assert all(any(set(batch) <= set(each) for each in whole) for batch in batches)
