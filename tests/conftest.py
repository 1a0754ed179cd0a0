"""Settings shared by every test, no network, no windows, repeatable draws; and fixtures of several files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Before any test imports torch, matplotlib or a hub client.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hypothesis import settings

# Deadlines measure the machine and not the code; derandomised runs fail the same way for everybody.
settings.register_profile("tokdyn", deadline=None, derandomize=True)
settings.load_profile("tokdyn")


@pytest.fixture
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """`with largest_file(bytes):` the system refuses to write a longer file, as a full disk would."""

    import resource  # POSIX only

    @contextmanager
    def refuse(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return refuse


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Starts every test from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a tiny DC-DiT as training does, and return its folder."""
    from tests.sampling import FACTS, tiny
    from tokdyn.train.snapshot import save_model

    save_model(tiny(0), tmp_path / "saved", FACTS)
    return tmp_path / "saved"
