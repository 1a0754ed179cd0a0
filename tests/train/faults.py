"""Faults that several tests inject: bad samples, signals at a step, folders that refuse writing."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tokdyn.data import BatchStream, ShapesDataset
from tokdyn.recipe import Recipe
from tokdyn.recipe.schema import DataConfig


class Poisoned(ShapesDataset):
    """Shapes, some of which hold a value that no picture has."""

    bad: frozenset[int] = frozenset()
    value = float("nan")

    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        samples, labels, used = super().fetch(indices, flips)
        for place, index in enumerate(used):
            if index in self.bad:
                samples[place] = self.value
        return samples, labels, used


def poison(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, steps: Sequence[int], value: float) -> set[int]:
    """Let one sample of each of these steps (counted from 1) hold a value, and return the indices of these samples."""
    config: DataConfig = recipe.data
    assert isinstance(config.size, int)
    data = Poisoned((config.size, config.size), config.channels, config.num_classes, config.seed, config.length)
    stream = BatchStream(data, recipe.training.batch_size, recipe.seed)
    bad = {int(stream.indices(step - 1)[1]) for step in steps}
    data.bad, data.value = frozenset(bad), value
    monkeypatch.setattr("tokdyn.train.setup.open_data", lambda config: data)
    return bad


class SignalAt:
    """A function that draws previews, and instead sends this process signals at a step."""

    def __init__(self, step: int, *numbers: signal.Signals, pause: float = 0.0) -> None:
        self.step, self.numbers, self.pause = step, numbers, pause

    def __call__(self, model: Any, recipe: Recipe, folder: Path, step: int) -> None:
        if step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)
                time.sleep(self.pause)


_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, by which root ignores permissions


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Protect a folder and those in it, also from root."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o500)
    try:
        with _without_override() if os.geteuid() == 0 else _nothing():
            if os.access(folder, os.W_OK, effective_ids=True):
                pytest.skip("permissions cannot be taken from root here")
            yield
    finally:
        for path in folders:
            path.chmod(0o700)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _without_override() -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable capabilities, twice
    if libc.capget(header, data):
        pytest.skip("the capabilities of this process are not known")
    before = data[0]
    data[0] = before & ~_OVERRIDE
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = before
        libc.capset(header, data)
