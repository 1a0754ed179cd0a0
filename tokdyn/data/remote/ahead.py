"""Bring data into the cache before they are needed, in a thread of the process that reads them."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tokdyn.data.remote.cache import CachedFile
from tokdyn.errors import TokdynError

_WAITING = 4  # later batches that are remembered
PAUSE = 0.5  # seconds between two looks at files that other processes bring


class ReadAhead:
    """Reads what is asked for first, and all other parts of some files in between.

    The processes of a machine share a cache and its files: each begins at a place of its own, a file that one of them
    reads is left to it, and in the end all files are there.
    """

    def __init__(self, files: Sequence[CachedFile]) -> None:
        """Remember the files; nothing is read before `ask`."""
        self._files = list(files)
        self._wanted: deque[Callable[[], object]] = deque(maxlen=_WAITING)
        self._owner = 0

    def ask(self, action: Callable[[], object], share: float) -> None:
        """Let the thread bring data.

        Args:
            action: brings what is needed next.
            share: in [0, 1), where among the files to begin with the others.
        """
        if not self._files:
            return
        self._wanted.append(action)
        if self._owner != os.getpid():  # a thread does not follow a process that is forked
            self._owner = os.getpid()
            threading.Thread(target=self._run, args=(share,), daemon=True).start()

    def _run(self, share: float) -> None:
        """Bring all files, and after each request what was asked for."""
        first = int(share * len(self._files))
        pending = self._files[first:] + self._files[:first]
        try:
            while pending:
                for file in list(pending):
                    self._serve()
                    for _ in file.fill():
                        self._serve()
                    if file.settled():
                        pending.remove(file)
                if pending:
                    time.sleep(PAUSE)
        except TokdynError:
            return  # whoever needs the data meets the same error, and says it

    def _serve(self) -> None:
        """Bring what was asked for."""
        while self._wanted:
            self._wanted.popleft()()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_wanted": deque(maxlen=_WAITING), "_owner": 0}
