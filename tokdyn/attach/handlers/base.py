"""What a method at work looks like, by where it acts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from tokdyn.attach.sites import Role

if TYPE_CHECKING:
    from tokdyn.attach.run import Run

Inner = Callable[[dict[str, Any]], Any]
"""A call of a block or a part of it that takes its arguments by name."""


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

    def always(self, run: Run, block: int) -> bool | None:
        """Whether it is skipped, where that is the same for all samples and levels; None where it is not."""

    def skips(self, run: Run, block: int) -> Sequence[bool]:
        """The same for every sample."""

    def weight(self, run: Run, block: int) -> Tensor | None:
        """(B,) share of the block's effect that is added, 0 or 1 with a gradient; None adds all of it."""


class Kernel(Protocol):
    """A method that computes a block, or parts of it, in another way."""

    def key(self, run: Run, block: int) -> Sequence[Hashable] | None:
        """For every sample what must be equal for samples to be computed together; None if all are."""

    def around(self, run: Run, part: nn.Module, role: Role, inner: Inner) -> Inner:
        """The computation of the block for samples of one key; `inner` is the block as it was."""

    def layer(self, run: Run, part: nn.Module, role: Role, call: Callable[..., Any], x: Tensor, *args: Any) -> Tensor:
        """The result of a layer of the block that stands in `Stack.width`; `call` is the layer as it was."""

    def forget(self) -> None:
        """Let go what was made of the model's weights."""


class Branch(Protocol):
    """A method around the attention or the MLP of a block."""

    def around(self, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]) -> Any:
        """The result of the branch; `call` takes its arguments by name."""


@dataclass(frozen=True)
class Actors:
    """The methods of a model, by how they act; outermost first.

    Attributes:
        edges: blocks at which a bracket opens or closes.
    """

    brackets: tuple[Bracket, ...] = ()
    gates: tuple[Gate, ...] = ()
    branches: tuple[Branch, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    edges: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        edges = frozenset(block for each in self.brackets for block in (each.first, each.last))
        object.__setattr__(self, "edges", edges)
