"""Blocks that are computed again in the backward pass, by checkpointing that a model does itself.

diffusers' models hold the function that checkpoints, and it is bound to the run (`checkpointing.py`). Others call
`torch.utils.checkpoint` in their forward (timm, forks of the public DiT): it calls a block again when the run is long
over, with the tensor that the block got the first time. That tensor leads back to the run as it was then.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.trace.calls import Record

if TYPE_CHECKING:
    from tokdyn.attach.attachment import Attachment

_HERE = object()  # stands for the tokens that lead back
_ANY = 0  # in the place of the id of a block
_OWNERS: WeakKeyDictionary[nn.Module, ReferenceType[Attachment]] = WeakKeyDictionary()
_HIDDEN: WeakSet[nn.Module] = WeakSet()  # blocks that ran without gradients in a call that wants them


def remember(run: Run, part: nn.Module, role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a block is called in a run: make a way back to the run as it is now.

    A cache decides anew whenever it is asked, so what it did while sampling cannot be done again.
    """
    if not run.gradients or torch.compiler.is_compiling():
        return
    if not run.training and run.attachment.has(FeatureCache):
        return
    if not torch.is_grad_enabled():
        _HIDDEN.add(part)
        return
    x = role.named(args, kwargs)[role.stack.tokens]
    _OWNERS[part] = ref(run.attachment)
    run.attachment.passed.setdefault(x, {})[id(part)] = _twin(run, x, _HERE)


def recall(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
    """The run that a block is computed again in, None if it is not computed again or was not in a run.

    Raises:
        InputError: the checkpointing hides the tensors that lead back.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return None
    owner = _OWNERS.get(part)
    attachment = None if owner is None else owner()
    if attachment is not None:
        for value in (*args, *kwargs.values()):
            runs = attachment.passed.get(value) if isinstance(value, Tensor) else None
            run: Run | None = runs and (runs.get(id(part)) or runs.get(_ANY))
            if run is not None:
                return _twin(run, _HERE, value)
    if part in _HIDDEN:
        raise InputError(
            "gradient checkpointing with use_reentrant=True computes blocks again outside of the call of a wrapped "
            "model; use use_reentrant=False."
        )
    return None


def go_on(run: Run, role: Role, out: Any) -> None:
    """After a block was computed again: the next one, if it is too, goes on in the same run."""
    x = out[role.stack.returns.index("tokens")] if isinstance(out, tuple) else out
    run.attachment.passed.setdefault(x, {})[_ANY] = _twin(run, x, _HERE)


def _twin(run: Run, old: Any, new: Any) -> Run:
    """A copy in which blocks can be run without an effect on the run itself, with one kept object for another.

    A run must not hold the tensor that leads to it, or neither would ever be let go.
    """

    def put(kept: Any) -> Any:
        if isinstance(kept, tuple):
            return tuple(new if each is old else each for each in kept)
        return new if kept is old else kept

    record = run.record
    twin = copy.copy(run)
    twin.record = Record(record.level, record.batch, record.cells, branch=record.branch)
    twin.kept = {key: put(kept) for key, kept in run.kept.items()}
    twin.losses, twin.named, twin.arguments, twin.followed, twin.guard = {}, {}, {}, {}, None
    return twin
