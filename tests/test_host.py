"""Memory settings, devices by name, and what a number was measured on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokdyn.errors import InputError
from tokdyn.host import bound_kernel_caches, describe, keep_large_buffers, open_device

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def test_allocator_settings_are_harmless() -> None:
    assert keep_large_buffers() in (True, False)
    torch.zeros(20_000_000).sum()


def test_kernel_caches_are_bounded_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHES[0], raising=False)
    monkeypatch.setenv(CACHES[1], "7")
    bound_kernel_caches()
    assert [os.environ[name] for name in CACHES] == ["64", "7"]


WORK = {
    "sample": "from tokdyn.sample import SampleConfig, sample; sample(SampleConfig(model='nowhere'))",
    "eval": "from tokdyn.evaluate import EvalConfig, evaluate; evaluate(EvalConfig(generated='nowhere'))",
    "features": "from tokdyn.data import FeaturesConfig, write_features; write_features(FeaturesConfig(out='nowhere'))",
}


@pytest.mark.parametrize("code", WORK.values(), ids=WORK)
def test_long_work_bounds_the_caches_before_it_begins(code: str, tmp_path: Path) -> None:
    """In a process of its own, because the settings belong to the process; the missing input ends the work at once."""
    after = f"\nimport json, os; print(json.dumps([os.environ.get(name) for name in {CACHES}]))"
    script = f"from tokdyn.errors import TokdynError\ntry:\n    {code}\nexcept TokdynError:\n    pass{after}"
    clean = {name: value for name, value in os.environ.items() if name not in CACHES}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=clean
    )
    assert json.loads(done.stdout) == ["64", "64"]


@pytest.mark.parametrize("name", ["warp", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"device={name} cannot be used here"):
        open_device(name)


def test_the_machine_is_described() -> None:
    told = describe(open_device("cpu"))
    assert told["device"] == "cpu"
    assert told["cpus"] == os.cpu_count()
    assert told["torch"] == torch.__version__
    assert all(isinstance(value, str | int) and value for value in told.values())
    assert open_device("auto").type in ("cpu", "cuda")
