"""What the launcher of several processes says: it is followed, or refused in a sentence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tokdyn.errors import InputError
from tokdyn.upcycling.processes import together


@pytest.mark.parametrize(
    "variable",
    [
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_MEGATRON_LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
    ],
)
def test_weights_that_are_divided_are_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=variable), together("cpu"):
        pass


def test_processes_that_cannot_be_reached_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE=2"), together("cpu"):
        pass


@pytest.mark.parametrize("count", ["2", "two", ""])
def test_a_process_without_a_rank_trains_alone(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a job of `tokdyn.team.joining` does: a job scheduler may set WORLD_SIZE without starting others."""
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.delenv("RANK", raising=False)
    with together("cpu") as device:
        assert device == torch.device("cpu")
        assert not dist.is_initialized()
