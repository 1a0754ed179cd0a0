"""tokdyn.attach stays a room that one can read: few files of moderate size, small classes, short paths."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tokdyn
from tests.contract.models import TINY
from tests.contract.widths import blocks_of
from tokdyn import DepthSkip, FeatureCache, TokenMerge

ROOM = Path(tokdyn.attach.__file__).parent
FILES = sorted(ROOM.rglob("*.py"))


def test_there_are_few_files_and_none_is_long_or_a_scrap() -> None:
    lines = {str(path.relative_to(ROOM)): len(path.read_text().splitlines()) for path in FILES}
    assert len(lines) <= 30
    assert {name: count for name, count in lines.items() if count > 300} == {}
    assert {name: count for name, count in lines.items() if count < 40 and not name.endswith("__init__.py")} == {}


def classes() -> Iterator[type]:
    """Classes that the room defines."""
    seen = set()
    for name, module in list(sys.modules.items()):
        if name.startswith("tokdyn.attach"):
            for kind in vars(module).values():
                if inspect.isclass(kind) and kind.__module__ == name and kind not in seen:
                    seen.add(kind)
                    yield kind


def attributes(kind: type) -> set[str]:
    """Attributes that a class declares, or that its methods set on self."""
    declared = set(vars(kind).get("__annotations__", {}))
    source = inspect.getsource(kind)
    for line in source.replace(",", "\n").splitlines():
        name = line.strip().removeprefix("self.")
        if line.strip().startswith("self.") and name.split(":")[0].split("=")[0].strip().isidentifier():
            left = name.split("=")[0].split(":")[0].strip()
            if "=" in name or ":" in name:
                declared.add(left)
    return declared


def test_no_class_has_more_than_twelve_attributes() -> None:
    found = {kind.__name__: len(attributes(kind)) for kind in classes()}
    assert found["Attachment"] > 5
    assert {name: count for name, count in found.items() if count > 12} == {}


@torch.no_grad()
def test_a_wrapped_block_of_flux_passes_through_seven_files_at_most() -> None:
    name = "FluxTransformer2DModel"
    model = tokdyn.wrap(
        TINY[name].build(),
        [FeatureCache(threshold=0.1), TokenMerge(ratio=0.5), DepthSkip(blocks=(1,), levels=(0.5, 1.0))],
    )
    passed: list[set[str]] = []
    inside = 0
    blocks = set(map(id, blocks_of(model)))

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal inside
        code = frame.f_code
        mine = code.co_filename.startswith(str(ROOM))
        starts = mine and code.co_name == "__call__" and id(frame.f_locals.get("self")) in blocks
        if starts and event == "call":
            inside += 1
            passed.append(set())
        if inside and mine and event == "call":
            passed[-1].add(str(Path(code.co_filename).relative_to(ROOM)))
        if starts and event == "return":
            inside -= 1

    sys.setprofile(trace)
    try:
        model(**TINY[name].inputs(2))
    finally:
        sys.setprofile(None)
    assert len(passed) == 4
    assert "engine.py" in set.intersection(*passed)
    assert max(map(len, passed)) <= 7, passed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOM)))
def test_nothing_is_keyed_by_the_id_of_a_handler(path: Path) -> None:
    assert not re.search(r"\bid\(self\)", path.read_text())
