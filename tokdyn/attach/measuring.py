"""Looking on while a wrapped model computes, without leaving a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokdyn.attach.attachment import Attachment


@dataclass(frozen=True)
class Meter:
    """What a call of a model is given while its FLOPs are counted.

    Attributes:
        counted: FLOPs so far.
        arguments: of the call by name, with their data where the model itself has none to compute with.
    """

    counted: Callable[[], int]
    arguments: Mapping[str, Any]


@contextmanager
def unnoticed(attachment: Attachment) -> Iterator[None]:
    """Within this context calls of the model see what the trajectory and the caches are at, and leave it so."""
    history, losses, trajectory = attachment.history, attachment.losses, attachment.trajectory
    watch, attachment.watch = attachment.watch, None
    memories = [(cache, cache.memory) for cache in attachment.memories]
    attachment.trajectory = copy.deepcopy(trajectory)
    for cache, memory in memories:
        branches = {name: copy.copy(branch) for name, branch in memory.branches.items()}
        cache.memory = replace(memory, branches=branches, routing=dict(memory.routing))
    try:
        yield
    finally:
        attachment.history, attachment.losses, attachment.trajectory = history, losses, trajectory
        attachment.watch = watch
        for cache, memory in memories:
            cache.memory = memory
