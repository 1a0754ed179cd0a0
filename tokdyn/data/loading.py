"""Load items of a data set in order, in worker processes whose failures are told in one sentence."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader

from tokdyn.errors import DataError, TokdynError

Item = TypeVar("Item")
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited)")


class _Carried(torch.utils.data.Dataset[Any], Generic[Item]):
    """A data set of items or errors: torch would put a traceback into the text of an error in a worker."""

    def __init__(self, items: torch.utils.data.Dataset[Item]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Item | TokdynError:
        try:
            return self.items[index]
        except TokdynError as error:
            return error


def load_in_order(
    items: torch.utils.data.Dataset[Item],
    order: range,
    workers: int = 0,
    generator: torch.Generator | None = None,
    pin_memory: bool = False,
) -> Iterator[Item]:
    """Yield items of a data set.

    Args:
        items: the data set; its items are not batched.
        order: the indices.
        workers: number of processes that load; 0 loads in this process.
        generator: draws the seed of the workers; None takes torch's global generator.
        pin_memory: put tensors into pinned memory.

    Raises:
        TokdynError: an item cannot be loaded, in whichever process, or a worker has ended.
    """
    loader = DataLoader(
        _Carried(items),
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
        generator=generator,
    )
    try:
        for item in loader:
            if isinstance(item, TokdynError):
                raise item
            yield item
    except RuntimeError as error:
        told = worker_ended(error)
        if told is None:
            raise
        raise told from error


def worker_ended(error: RuntimeError) -> DataError | None:
    """Return a sentence about the worker whose end torch reports; None if it reports something else.

    It does so where it waits for an item, and in a handler of signals, which may interrupt any line of the process.
    """
    found = _WORKER.search(str(error))
    if found is None:
        return None
    how = f"was killed ({found[2]})" if found[2] else "ended"
    return DataError(
        f"The process {found[1]} that loaded data {how}, perhaps for want of memory: run the command again, a training "
        "with --resume, and if it happens again with fewer workers."
    )


def _leave_signals(worker: int) -> None:
    """Let the main process decide what Ctrl-C and a closed terminal mean; its workers get these signals, too."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
