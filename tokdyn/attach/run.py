"""One call of a wrapped model: where it is, which tokens there are, and what each method does about it.

Everything that belongs to a call lives in its `Run` and goes away with it. What must outlast it is the `Memory` of the
caches, and the record that `tokdyn.stats` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import ModelAdapter, Stack
from tokdyn.attach.roles import Role
from tokdyn.attach.tokens import follow, join, of_samples, split
from tokdyn.tokens import Grid, cells


class Bracket(Protocol):
    """A method around the blocks `first` to `last`."""

    @property
    def first(self) -> int: ...  # noqa: D102

    @property
    def last(self) -> int: ...  # noqa: D102

    def open(self, run: Run, x: Tensor) -> Tensor:
        """What the blocks see instead of the tokens x (B, N, D)."""

    def close(self, run: Run, x: Tensor) -> Tensor:
        """The tokens (B, N, D) after the blocks."""


class Gate(Protocol):
    """A method that decides whether a block runs."""

    def skips(self, level: float, block: int) -> bool:
        """Whether the block returns what it was given, at this noise level."""

    def always(self, block: int) -> bool | None:
        """The same where it does not depend on the level, None where it does."""


class Branch(Protocol):
    """A method around the attention or the MLP of a block."""

    def around(self, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """The result of the branch; `call` takes its arguments by name."""


@dataclass(frozen=True)
class Actors:
    """The methods of a model, by how they act; outermost first."""

    brackets: tuple[Bracket, ...] = ()
    gates: tuple[Gate, ...] = ()
    branches: tuple[Branch, ...] = ()


@dataclass
class Record:
    """What happened in one call; see `tokdyn.stats`."""

    level: Tensor | float = 0.0
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: bool = False
    losses: dict[str, Tensor] = field(default_factory=dict)


class Run:
    """One call.

    Attributes:
        model: the wrapped model.
        adapter: what is known of it.
        roles: of its parts.
        actors: the methods.
        training: gradients are wanted.
        index: (B, M) cells whose tokens are there, None while all are.
        kept: what a bracket keeps from its opening to its closing, by its id.
        part: the block that is being called.
        stack: where it is.
        named: its arguments by name.
        idle: a bracket asked the blocks to pass everything through.
        record: what has happened so far.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ModelAdapter,
        roles: dict[int, Role],
        actors: Actors,
        grid: Callable[[], Grid],
        level: Callable[[], Sequence[float]],
    ) -> None:
        self.model, self.adapter, self.roles, self.actors = model, adapter, roles, actors
        self._read_level, self._read_grid = level, grid
        self._level: Sequence[float] | None = None
        self._grid: Grid | None = None
        self.training = model.training and torch.is_grad_enabled()
        self.index: Tensor | None = None
        self.idle = False
        self.kept: dict[Any, Any] = {}
        self.part: nn.Module = model
        self.stack = adapter.stacks[0]
        self.named: dict[str, Any] = {}
        self.record = Record()
        self._followed: dict[tuple[int, int], tuple[Any, Any]] = {}

    @property
    def level(self) -> Sequence[float]:
        """Noise level of every sample, read when a method asks for it: on an accelerator the host waits for it."""
        if self._level is None:
            self._level = self._read_level()
        return self._level

    @level.setter
    def level(self, level: Sequence[float]) -> None:
        self._level = level

    @property
    def grid(self) -> Grid:
        """Cells of the full grid, read from the arguments of the model when a method asks for it."""
        if self._grid is None:
            self._grid = self._read_grid()
        return self._grid

    @property
    def count(self) -> int:
        """Image tokens of a sample that are there now."""
        return cells(self.grid) if self.index is None else self.index.shape[1]

    def block(
        self, part: nn.Module, role: Role, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call one block, or do not; `call` is the block as it was."""
        named = role.named(args, kwargs)
        self.part, self.stack, self.named = part, role.stack, named
        text, x = self._split(named[role.stack.tokens], role.stack)
        opening = [bracket for bracket in self.actors.brackets if bracket.first == role.block]
        for bracket in opening:
            x = bracket.open(self, x)
        if opening:
            named[role.stack.tokens] = join(text, x, role.stack.image)
        given = {"tokens": named[role.stack.tokens], "text": named.get(role.stack.text or "")}
        running = self._running(role.block)
        if running == []:
            results = given
        else:
            self.record.blocks.append(role.block)
            self.record.tokens.append(x.shape[1])
            if self.index is not None:
                self._cut(role.stack, named)

            def inner(arguments: dict[str, Any]) -> Any:
                return call(*(arguments[name] for name in role.names[: len(args)]), **{k: arguments[k] for k in kwargs})

            out = inner(named) if running is None else self.part_of(running, role.stack, named, inner)
            parts = out if isinstance(out, tuple) else (out,)
            results = dict(zip(role.stack.returns, parts, strict=False))
            if running is not None:
                rows = torch.tensor(running, device=x.device)
                results = {k: _put(given[k], rows, v) for k, v in results.items()}
        closing = [bracket for bracket in reversed(self.actors.brackets) if bracket.last == role.block]
        if closing:
            text, x = self._split(results["tokens"], role.stack)
            for bracket in closing:
                x = bracket.close(self, x)
            results["tokens"] = join(text, x, role.stack.image)
        if len(role.stack.returns) == 1:
            return results["tokens"]
        return tuple(results[name] for name in role.stack.returns)

    def branch(self, role: Role, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the attention or the MLP of a block through what is around it."""
        if not self.actors.branches:
            return call(*args, **kwargs)
        named = role.named(args, kwargs)

        def inner(**arguments: Any) -> Any:
            return call(*(arguments[name] for name in role.names[: len(args)]), **{k: arguments[k] for k in kwargs})

        for each in reversed(self.actors.branches):
            inner = _through(each, self, role, inner)
        return inner(**named)

    def _running(self, block: int) -> list[int] | None:
        """The samples that a block is computed for, None for all."""
        gates = [gate for gate in self.actors.gates if gate.always(block) is not False]
        if self.idle or any(gate.always(block) for gate in gates):
            return []
        if not gates:
            return None
        skipped = {level: any(gate.skips(level, block) for gate in gates) for level in set(self.level)}
        running = [i for i, level in enumerate(self.level) if not skipped[level]]
        return None if len(running) == len(self.level) else running

    def part_of(
        self, samples: Sequence[int], stack: Stack, named: dict[str, Any], call: Callable[[dict[str, Any]], Any]
    ) -> Any:
        """Call something on some of the samples alone; while it runs, they are all there is."""
        level, index = self.level, self.index
        rows = torch.tensor(samples, device=named[stack.tokens if stack.tokens in named else next(iter(named))].device)
        self.level = [level[i] for i in samples]
        self.index = None if index is None else index.index_select(0, rows)
        try:
            return call(of_samples(named, rows, len(level), stack))
        finally:
            self.level, self.index = level, index

    def _split(self, x: Tensor, stack: Stack) -> tuple[Tensor | None, Tensor]:
        """Text and image tokens of what a block gets or returns."""
        return split(x, None if stack.image == "all" else self.count, stack.image)

    def _cut(self, stack: Stack, named: dict[str, Any]) -> None:
        """Leave only the entries of the tokens that are there, in every argument that has one for each token."""
        assert self.index is not None
        for how in stack.follow:
            value = named.get(how.name)
            if value is None:
                continue
            key = (id(value), id(self.index))
            if key not in self._followed:  # the values are kept, so that an id stays theirs
                self._followed[key] = (value, follow(value, how, stack, self.index, cells(self.grid)))
            named[how.name] = self._followed[key][1]


def _put(whole: Any, rows: Tensor, part: Any) -> Any:
    """The results of some samples in place of what was there."""
    return part if whole is None or part is None else whole.index_copy(0, rows, part.to(whole.dtype))


def _through(branch: Branch, run: Run, role: Role, call: Callable[..., Any]) -> Callable[..., Any]:
    def through(**named: Any) -> Any:
        return branch.around(run, role, call, named)

    return through
