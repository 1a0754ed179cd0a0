"""Memory settings, devices by name, and the description of the machine."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tokdyn.data import FeaturesConfig, write_features
from tokdyn.errors import InputError, TokdynError
from tokdyn.evaluate import EvalConfig, evaluate
from tokdyn.host import bound_kernel_caches, describe, keep_large_buffers, open_device
from tokdyn.sample import SampleConfig, sample

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


FAULTS = """
import json, resource
import torch
from tokdyn.host import keep_large_buffers

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
taken = keep_large_buffers()
faults()
print(json.dumps([taken, plain, faults()]))
"""


def test_large_buffers_are_reused() -> None:
    """A buffer of 64 MB faults in all its pages unless the allocator keeps them; the heap settles in the first few."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    taken, plain, kept = json.loads(done.stdout)
    if not taken:
        pytest.skip("the C library does not take the settings")
    assert kept < 0.1 * plain


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: pytest.fail("the C library was called"))
    assert not keep_large_buffers()


def test_kernel_caches_are_bounded_unless_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHES[0], raising=False)
    monkeypatch.setenv(CACHES[1], "7")
    bound_kernel_caches()
    assert [os.environ[name] for name in CACHES] == ["64", "7"]


WORK = {
    "sample": lambda: sample(SampleConfig(model="nowhere")),
    "eval": lambda: evaluate(EvalConfig(generated="nowhere")),
    "features": lambda: write_features(FeaturesConfig(out="nowhere")),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_long_work_bounds_the_caches_before_it_begins(
    work: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing input ends the work at once."""
    monkeypatch.chdir(tmp_path)
    for name in CACHES:
        monkeypatch.setenv(name, "removed")  # so that it is as before when the test is over
        monkeypatch.delenv(name)
    with suppress(TokdynError):
        work()
    assert [os.environ.get(name) for name in CACHES] == ["64", "64"]


@pytest.mark.parametrize("name", ["warp", "cuda:99", "meta"])
def test_unavailable_devices_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"device={name}"):
        open_device(name)


def test_the_machine_is_described() -> None:
    machine = describe(open_device("cpu"))
    assert machine["device"] == "cpu"
    assert machine["cpus"] == os.cpu_count()
    assert machine["torch"] == torch.__version__
    assert all(isinstance(value, str | int) and value for value in machine.values())
    assert open_device("auto").type in ("cpu", "cuda")
