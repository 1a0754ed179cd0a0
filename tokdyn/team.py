"""Divide a job over the processes that torchrun or accelerate have started: which part is whose, what they exchange.

The parts of a job are dealt out in turn: of N processes, that of rank r gets the parts r, r + N, r + 2 N and so on.
They exchange JSON and tensors through gloo, on the CPU. Every process takes part in every exchange, and an error takes
the place of what its process would have sent: so it ends all of them, wherever they are.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tokdyn import errors
from tokdyn.errors import InputError, OutputError, TokdynError
from tokdyn.ownership import LOCK, owning

USE_FSDP = "ACCELERATE_USE_FSDP"
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables by which accelerate asks to divide weights over processes in other ways than FSDP."""
_PATIENCE = timedelta(hours=12)  # to wait for a process that is alive; one that has ended is noticed at once
_SHARED = 10.0  # seconds until a file of another machine has to be seen
_PIECE = 2**26  # elements of a tensor that are sent at once
_DTYPES = {str(each): each for each in (torch.uint8, torch.int64, torch.float32, torch.float64)}
_Part = TypeVar("_Part")


class Team:
    """The processes that work on one job; by default this process alone.

    Attributes:
        rank: number of this process, from 0.
        count: number of all of them.
        broken: whether another process has ended without a word.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.count, self.broken = rank, count, False
        self._group, self._over = group, False

    def __repr__(self) -> str:
        return f"Team(rank={self.rank}, count={self.count})"

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once, and prints."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this process prints the error that ends the team: the first, unless it may be the one that ended."""
        return self.first or self.broken

    def share(self, parts: Sequence[_Part]) -> Sequence[_Part]:
        """Return the parts of a job that are this process's."""
        return parts[self.rank :: self.count]

    def rounds(self, parts: Sequence[_Part]) -> Iterator[_Part | None]:
        """Yield this process's part in each round, as often in every process; None where the parts have run out."""
        mine = self.share(parts)
        for number in range(-(-len(parts) // self.count)):
            yield mine[number] if number < len(mine) else None

    def in_order(self, shares: Sequence[Sequence[_Part]]) -> list[_Part]:
        """Return what was made of each part, in the order of the parts, from what each process made of its share."""
        total = sum(map(len, shares))
        return [shares[number % self.count][number // self.count] for number in range(total)]

    def exchange(self, value: Any) -> list[Any]:
        """Send JSON data to all processes.

        Returns:
            What each process sent, by rank.

        Raises:
            TokdynError: another process failed (its error is raised here too), or has ended.
        """
        if self.count == 1:
            return [value]
        content = json.dumps(value).encode()
        with self._talking():
            return [json.loads(each) for each in self._gathered(content, self._lengths(content))]

    def from_first(self, value: Any) -> Any:
        """Return the JSON data that the first process gives; what the others give is ignored. Raises as `exchange`."""
        return self.exchange(value if self.first else None)[0]

    def collect(self, tensor: Tensor) -> list[Tensor]:
        """Send tensors of any shape, on the CPU, to the first process.

        Returns:
            In the first process the tensor of each process, by rank; in the others nothing. Raises as `exchange`.
        """
        tensor = tensor.contiguous()
        if self.count == 1:
            return [tensor]
        layouts = self.exchange([list(tensor.shape), str(tensor.dtype)])
        with self._talking():
            if not self.first:
                for piece in torch.split(tensor.flatten(), _PIECE):
                    dist.send(piece, group=self._group, group_dst=0)
                return []
            found = [tensor]
            for rank, (shape, dtype) in enumerate(layouts[1:], 1):
                found.append(torch.empty(shape, dtype=_DTYPES[dtype]))
                for piece in torch.split(found[-1].flatten(), _PIECE):
                    dist.recv(piece, group=self._group, group_src=rank)
            return found

    def agree(self, what: str, value: Any) -> None:
        """Check that all processes have equal JSON data.

        Raises:
            InputError: another process has other data; `what` says of what.
        """
        found = self.exchange(value)
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise InputError(
                f"Process {other} has another {what} than process 0: give all of them the same command and files, of "
                "one version."
            )

    @contextmanager
    def after_first(self) -> Iterator[None]:
        """Run the block in the first process before the others, which so find what it downloads; a context manager."""
        if not self.first:
            self.exchange(None)
        yield
        if self.first:
            self.exchange(None)

    def described(self, machine: dict[str, str | int]) -> dict[str, str | int]:
        """Return the description of a machine, with the number of processes if there are several."""
        return machine if self.count == 1 else machine | {"processes": self.count}

    @contextmanager
    def owning(self, folder: Path) -> Iterator[None]:
        """Own a folder, as one process for all; a context manager. See `tokdyn.ownership.owning`.

        Raises:
            OutputError: another job owns the folder, it cannot be written to, or not all processes see it.
        """
        with ExitStack() as owned:
            if self.first:
                owned.enter_context(owning(folder))
            mark = self.from_first(_text(folder / LOCK) if self.first else None)
            waited = time.monotonic() + _SHARED
            while not self.first and _text(folder / LOCK) != mark:
                if time.monotonic() > waited:
                    raise OutputError(
                        f"Process {self.rank} does not see what process 0 writes into {folder}: choose an out=FOLDER "
                        "on a disk that all machines share."
                    )
                time.sleep(0.05)
            yield
            self.exchange(None)  # nobody writes any more

    def tell(self, error: BaseException) -> None:
        """Tell the other processes of an error that ends this one, unless it came from them."""
        if self.count == 1 or self._over:
            return
        try:
            with self._talking():
                content = json.dumps(_told(error, self.rank)).encode()
                self._lengths(content, failed=True)
        except (TokdynError, KeyboardInterrupt):
            pass  # others have failed too, and each tells of itself

    def leave(self) -> None:
        """Wait for all processes, so that none leaves while another fails. Raises as `exchange`."""
        self.exchange(None)
        self._over = True

    def _lengths(self, content: bytes, failed: bool = False) -> list[int]:
        """Exchange the lengths of what is sent next; where it is an error, raise it in all processes but its own."""
        own = torch.tensor([len(content), int(failed)])
        heads = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(heads, own, group=self._group)
        lengths, failures = torch.stack(heads).T.tolist()
        if any(failures):
            self._over = True
            said = self._gathered(content if failed else b"", [n * f for n, f in zip(lengths, failures, strict=True)])
            raise _error_of([json.loads(each) for each in said if each])
        return list(lengths)

    def _gathered(self, content: bytes, lengths: Sequence[int]) -> list[bytes]:
        """Exchange bytes whose lengths all processes know."""
        own = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        if content:
            own[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(found, own, group=self._group)
        return [each[:length].numpy().tobytes() for each, length in zip(found, lengths, strict=True)]

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Say in a sentence that another process has ended; and let Ctrl-C wait, which would leave half an exchange."""
        with _ctrl_c_later():
            try:
                yield
            except RuntimeError as error:  # of gloo
                self.broken = self._over = True
                raise TokdynError(
                    "Another process of this job ended or does not answer; its own last line says why. Run the same "
                    "command again: it goes on with what was finished."
                ) from error


ALONE = Team()
"""This process alone."""


@contextmanager
def joining() -> Iterator[Team]:
    """Join the processes that torchrun or accelerate have started, if they have; a context manager.

    Meanwhile only the first process prints, and each has a GPU of its own, if there are any: "auto" and "cuda" mean
    that. An error in one process ends the block in all of them. A process joins once: another could still be leaving.

    Yields:
        The team, of this process alone if there are no others.

    Raises:
        InputError: there should be other processes, and they cannot be reached.
    """
    if launched() == 1:
        yield Team()
        return
    with connected("gloo", _PATIENCE) as own:
        group = None  # that of all processes
        if not own:
            with _reaching():
                group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        team = Team(dist.get_rank(), dist.get_world_size(), cast(dist.ProcessGroup | None, group))
        try:
            with ExitStack() as silence:
                if not team.first:
                    nowhere = silence.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
                    silence.enter_context(redirect_stdout(nowhere))
                    silence.enter_context(redirect_stderr(nowhere))
                yield team
                team.leave()
        except BaseException as error:
            team.tell(error)
            raise


def launched() -> int:
    """Return how many processes torchrun or accelerate have started; 1 if they have not."""
    count = os.environ.get("WORLD_SIZE", "1")
    return max(1, int(count)) if "RANK" in os.environ and count.isdecimal() else 1


def asks_for(variable: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether a variable is set to true, as accelerate reads it."""
    return environ.get(variable, "false").lower() in ("true", "1")


@contextmanager
def connected(backend: str, timeout: timedelta | None = None) -> Iterator[bool]:
    """Connect to the other processes, if that is still to be done, and leave them at the end; a context manager.

    Args:
        backend: that of `torch.distributed`, "gloo" or "nccl".
        timeout: how long to wait for a process in each exchange; None is the default of the backend.

    Yields:
        Whether this has connected them, and they were not before.

    Raises:
        InputError: they cannot be reached.
    """
    own = not dist.is_initialized()
    if own:
        # The defaults of its functions are the group of when it is first imported, which then outlives the job: threads
        # of gloo that are there as the interpreter ends can abort it.
        import torch.distributed.nn  # noqa: F401

        with _reaching():
            dist.init_process_group(backend, timeout=timeout)
    try:
        yield own
    finally:
        if own:
            dist.destroy_process_group()


@contextmanager
def _reaching() -> Iterator[None]:
    """Raise an InputError if the other processes cannot be reached in the block; a context manager."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE={launched()} says that there are {launched()} processes, but they cannot be reached "
            f"({str(error).splitlines()[0]}): start them with torchrun or accelerate launch, or unset WORLD_SIZE."
        ) from error


def _told(error: BaseException, rank: int) -> dict[str, str]:
    """Return what other processes are told of an error."""
    if isinstance(error, TokdynError | KeyboardInterrupt):
        return {"kind": type(error).__name__, "text": str(error)}
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f"{error.filename}: "
        return {"kind": "OutputError", "text": f"{place}{error.strerror}."}
    return {
        "kind": "TokdynError",
        "text": f"Process {rank} failed, and shows where ({type(error).__name__}: {error}).",
    }


def _error_of(told: Sequence[dict[str, str]]) -> BaseException:
    """Return the error to raise for what processes have told: that of the lowest rank that was not interrupted."""
    worst = next((each for each in told if each["kind"] != "KeyboardInterrupt"), None)
    if worst is None:
        return KeyboardInterrupt()
    kind = getattr(errors, worst["kind"], TokdynError)
    error: BaseException = kind(worst["text"])
    return error


def _text(path: Path) -> str:
    """Return the text of a file; "" if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Raise the KeyboardInterrupt of a Ctrl-C at the end of the block."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):  # it is ignored, or kills
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
