"""One call of a wrapped model: where it is, which tokens there are, and what each method does about it.

Everything that belongs to a call lives in its `Run` and goes away with it. What must outlast it is in the attachment:
the memory of caches, the records that `tokdyn.stats` shows, and the losses of the last call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Stack
from tokdyn.attach.class_swap import base_class
from tokdyn.attach.groups import Group, arguments_of, grouped, put
from tokdyn.attach.handlers.base import Branch
from tokdyn.attach.offload import Weights
from tokdyn.attach.once import Once
from tokdyn.attach.packed import packed_block
from tokdyn.attach.sites import Role
from tokdyn.attach.tokens import join, of_samples, split
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, Packing, cells
from tokdyn.trace.calls import BlockCall, Record
from tokdyn.trace.trajectory import Turn

if TYPE_CHECKING:
    from tokdyn.attach.attachment import Attachment


class Run:
    """One call.

    Attributes:
        model: the wrapped model.
        attachment: what it carries.
        arguments: of the call, by name.
        gradients: they are wanted.
        training: the model is training, and gradients are wanted.
        samples: of the batch that are being computed.
        index: (B, M) cells whose tokens are there, None while all are.
        lengths: tokens of each sample that count, where they differ; the rest of its M hold nothing.
        packing: where packed rows lie, in models whose blocks get those.
        reused: samples for which a cache asked the blocks to pass everything through.
        kept: what a method keeps for later in the call, by its id.
        part: the block that is being called.
        stack: where it is.
        named: its arguments by name.
        followed: arguments that were cut to the tokens of a group, beside what they were cut from.
        losses: auxiliary losses so far.
        record: what has happened so far.
        call: what is happening in the block that is being computed.
        over: the model has returned.
        weights: where those of the blocks are.
        guard: checks of a model whose adapter was inferred, None for others.
        given: tensors from outside that the inside of a block may use. Checkpointing hands them in.
        whose: the samples that these have entries for.
        words: text tokens of each in one sequence with those of the image, where layers run over both.
        found: tensors from the inside of a block for what is around it, by samples. Checkpointing hands them out.
    """

    def __init__(
        self, model: nn.Module, attachment: Attachment, arguments: Mapping[str, Any], grid: Grid | None = None
    ) -> None:
        self.model, self.attachment, self.arguments = model, attachment, arguments
        self.adapter, self.actors = attachment.adapter, attachment.actors
        self.roles = attachment.roles(model)
        self.gradients = torch.is_grad_enabled()
        self.training = model.training and self.gradients
        self.samples: tuple[int, ...] = ()
        self.index: Tensor | None = None
        self.lengths: tuple[int, ...] | None = None
        self.packing: Packing | None = None
        self.reused: frozenset[int] = frozenset()
        self.kept: dict[Any, Any] = {}
        self.part: nn.Module = model
        self.stack = self.adapter.stacks[0]
        self.named: dict[str, Any] = {}
        self.losses: dict[str, Tensor] = {}
        level = None if self.adapter.level is None else self.adapter.level(model, arguments)
        self.record = Record(level, training=self.training, branch=attachment.branch)
        self.guard = attachment.guard(model, arguments) if self.adapter.inferred else None
        self.call = BlockCall(0, 0, 0)
        self.over = False
        self.weights = Weights()
        self.given: dict[str, Tensor] = {}
        self.whose: tuple[int, ...] = ()
        self.words = 0
        self.found: dict[tuple[int, ...], Tensor] = {}
        self._level: tuple[float, ...] | None = None
        self._grid: Once[Grid] = Once(self._read_grid)
        if grid is not None:
            self._grid.put(grid)
        self._turn: Once[Turn] = Once(self._read_turn)
        self.followed: dict[Hashable, tuple[Any, Any]] = {}

    @property
    def level(self) -> tuple[float, ...]:
        """Noise level of every sample, read when a method asks for it: on an accelerator the host waits for it."""
        if self._level is None:
            self._level = self.per_sample(self.record.clock.tolist(), "the timestep")
        return self._level

    def clock(self, device: torch.device | str) -> Tensor:
        """(B,) or (1,) fp32 noise levels on a device; see `Record.clock`."""
        if self._level is not None:
            return torch.tensor(self._level, device=device)
        return self.record.clock.to(device)

    @property
    def device(self) -> torch.device:
        """Where the block that is called computes."""
        device: torch.device = self.named[self.stack.tokens].device
        return device

    @property
    def turn(self) -> Turn:
        """Which step of which branch this call is. A method that asks must ask in every call."""
        return self._turn.value

    def _read_turn(self) -> Turn:
        return self.attachment.trajectory.turn(self.level, self.record.branch)

    @property
    def grid(self) -> Grid:
        """Cells of the full grid, read from the arguments of the model when a method asks for it."""
        return self._grid.value

    def _read_grid(self) -> Grid:
        assert self.adapter.grid is not None, "methods that need a grid were refused"
        return self._checked(self.adapter.grid(self.model, self.arguments))

    def _checked(self, grid: Grid) -> Grid:
        """The grid, which has to be that of the image tokens, where their number is known."""
        if self.record.cells not in (0, cells(grid)):
            raise InputError(
                f"the token grid of this {type(self.model).__name__} is {' x '.join(map(str, grid))}, but its blocks "
                f"get {self.record.cells} image tokens; leave out what adds or takes away tokens, such as images."
            )
        return grid

    def release(self) -> None:
        """Let go of the arguments: what comes back to this run later must not keep them alive."""
        self.named, self.arguments, self.part = {}, {}, self.model
        self._grid.close()
        self._turn.close()

    @property
    def batch(self) -> int:
        """B, of what is being computed."""
        return len(self.samples)

    @batch.setter
    def batch(self, batch: int) -> None:
        self.samples = tuple(range(batch))

    @property
    def count(self) -> int:
        """Image tokens of a sample that there is room for now."""
        return cells(self.grid) if self.index is None else self.index.shape[1]

    def block(
        self, part: nn.Module, role: Role, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call one block, or do not; `call` is the block as it was."""
        meter = self.attachment.meter
        if meter is None:
            return self._block(part, role, call, args, kwargs)
        before = meter.counted()
        out = self._block(part, role, call, args, kwargs)
        self.record.inside += meter.counted() - before
        return out

    def _block(
        self, part: nn.Module, role: Role, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if role.stack.packing is not None:
            return packed_block(self, part, role, call, args, kwargs)
        named = role.named(args, kwargs)
        if self.guard is not None:
            role = self.guard.begin(self.roles, part, named, lambda: base_class(part).__call__(part, *args, **kwargs))
        if self.adapter.grid is None:
            self._grid.put((named[role.stack.tokens].shape[1],))
        stack = role.stack
        self.part, self.stack, self.named = part, stack, named
        batch = len(named[stack.tokens])
        if len(self.samples) != batch:
            self.batch = batch
        if not self.record.batch:
            self._begin(named, stack)
        edge = role.block in self.actors.edges
        if edge:
            named[stack.tokens] = self._opened(role, named[stack.tokens])
        alone = self._alone(batch)
        if alone and not (edge or self.reused):
            return self._called(named, role, partial(call, *args, **kwargs))
        given = {"tokens": named[stack.tokens], "text": named.get(stack.text or "")}
        inner = role.by_name(call, args, kwargs)
        if not alone:
            results = self._weighted(role.block, given, self._computed(part, role, inner, given))
        elif self.reused:
            self.weights.skipped(part)
            results = given
        else:
            results = _results(stack, self._called(named, role, partial(inner, named)))
        if edge:
            results["tokens"] = self._closed(role, results["tokens"])
        if self.guard is not None:
            self.guard.before = (stack.path, results["tokens"])
        return results["tokens"] if len(stack.returns) == 1 else tuple(results[name] for name in stack.returns)

    def _begin(self, named: Mapping[str, Any], stack: Stack) -> None:
        """Note what the first block is given."""
        x = self._split(named[stack.tokens], stack)[1]
        self.record.batch, self.record.cells = len(x), x.shape[1]
        self.record.text, self.record.context = _others(named, stack, x.shape[1])
        if self._grid.known:
            self._checked(self.grid)

    def _opened(self, role: Role, tokens: Tensor) -> Tensor:
        """Tokens of a block after the brackets that open before it."""
        text, x = self._split(tokens, role.stack)
        for bracket in self.actors.brackets:
            if bracket.first == role.block and len(self.reused) < self.batch:  # otherwise nothing is computed within
                x = bracket.open(self, x)
        return join(text, x, role.stack.image)

    def _closed(self, role: Role, tokens: Tensor) -> Tensor:
        """Tokens of a block after the brackets that close behind it."""
        text, x = self._split(tokens, role.stack)
        for bracket in reversed(self.actors.brackets):
            if bracket.last == role.block:
                x = bracket.close(self, x)
        return join(text, x, role.stack.image)

    def _alone(self, batch: int) -> bool:
        """Whether nothing acts on the block itself, and it is called or passed by for all samples together."""
        if self.actors.gates or self.actors.kernels or self.guard is not None or self.lengths:
            return False
        if self.index is not None and self.stack.follow:
            return False
        return len(self.reused) in (0, batch)

    def branch(self, role: Role, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the attention or the MLP of a block through what is around it."""
        if not self.actors.branches:
            return call(*args, **kwargs)
        named = role.named(args, kwargs)

        def inner(**arguments: Any) -> Any:
            given = [arguments.pop(name) for name in role.names[: len(args)]]
            return call(*given, **arguments)

        for each in reversed(self.actors.branches):
            inner = _through(each, self, role, inner)
        return inner(**named)

    def layer(self, part: nn.Module, role: Role, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Call a layer of a block through what changes its inputs or outputs."""
        for kernel in self.actors.kernels:
            call = partial(kernel.layer, self, part, role, call)
        return call(*args)

    def _computed(
        self, part: nn.Module, role: Role, inner: Callable[[dict[str, Any]], Any], given: dict[str, Any]
    ) -> dict[str, Any]:
        """What the block makes of the tokens, for the samples that it runs for."""
        plan = self.running(role.block)
        if plan is None and not self.lengths:
            return self._part(part, role, inner, None)
        running, keys = plan or (list(range(self.batch)), [()] * self.batch)
        lengths = self.lengths or (self.count,) * self.batch
        results = dict(given)
        if self.guard is not None and running:  # which arguments have a batch is not known: compute all, keep some
            rows = torch.tensor(running, device=given["tokens"].device)
            for name, value in self._part(part, role, inner, None).items():
                results[name] = put(results[name], rows, None if value is None else value.index_select(0, rows))
            return results
        for key, samples in grouped([(length, *key) for length, key in zip(lengths, keys, strict=True)], running):
            length = lengths[samples[0]]
            if len(samples) == self.batch and length == self.count:
                return self._part(part, role, inner, None)
            rows = torch.tensor(samples, device=given["tokens"].device)
            cut = None if self.index is None else self.index.index_select(0, rows)[:, :length]
            found = self._part(part, role, inner, Group(samples, rows, cut, (key, samples)))
            for name, value in found.items():
                image = role.stack.image if name == "tokens" else None
                results[name] = put(results[name], rows, value, image, self.count, length)
        return results

    def running(self, block: int) -> tuple[list[int], list[tuple[Hashable, ...]]] | None:
        """The samples that a block runs for, and for every sample what those computed together must share.

        Returns:
            None where the block runs for all samples together.
        """
        gates = [gate for gate in self.actors.gates if gate.always(self, block) is not False]
        if len(self.reused) == self.batch or any(gate.always(self, block) for gate in gates):
            self.weights.skipped(self.part)
            return [], [()] * self.batch
        skipped = [False] * self.batch
        for gate in gates:
            skipped = [one or other for one, other in zip(skipped, gate.skips(self, block), strict=True)]
        found = [kernel.key(self, block) for kernel in self.actors.kernels]
        parting = [key for key in found if key is not None]
        if not (any(skipped) or self.reused or parting):
            return None
        running = [i for i in range(self.batch) if not skipped[i] and i not in self.reused]
        if not running:
            self.weights.skipped(self.part)
        return running, [tuple(key[i] for key in parting) for i in range(self.batch)]

    def _part(
        self, part: nn.Module, role: Role, inner: Callable[[dict[str, Any]], Any], group: Group | None
    ) -> dict[str, Any]:
        """The block computed for one group of samples, or for all."""
        for kernel in self.actors.kernels:
            inner = kernel.around(self, part, role, inner)
        named = arguments_of(self, role.stack, group)
        if group is None:
            out = self._called(named, role, lambda: inner(named))
        else:
            run = partial(self.among, group.samples, group.index, lambda: inner(named))
            out = self._called(named, role, run, group)
        if self.guard is not None:
            self.guard.after(role.stack, named[role.stack.tokens], out)
        return _results(role.stack, out)

    def _called(self, named: Mapping[str, Any], role: Role, call: Callable[[], Any], group: Group | None = None) -> Any:
        """Call a block with these arguments for a group of samples, or for all, and put it on record."""
        image = self.count if group is None or group.index is None else group.index.shape[1]
        samples = self.batch if group is None else len(group.samples)
        which = self.which(None if group is None else group.samples)
        self.call = BlockCall(role.block, samples, image, *_others(named, role.stack, image), which=which)
        self.record.calls.append(self.call)
        return call()

    def here(self) -> tuple[Any, ...]:
        """Which samples and tokens there are, to come back to with `go`."""
        here = self.samples, self._level, self.index, self.lengths, self.packing, self.call
        return (*here, self.given, self.whose, self.words, self.found)

    def go(self, place: tuple[Any, ...]) -> None:
        """Be where `here` was."""
        self.samples, self._level, self.index, self.lengths, self.packing, self.call, *rest = place
        self.given, self.whose, self.words, self.found = rest
        if self.over:  # what is computed again is noted nowhere
            self.call = BlockCall(0, 0, 0)

    def finish(self) -> Record:
        """What has happened. Blocks that are computed again for a backward pass add nothing to it."""
        done = self.record
        self.record, self.over = Record(done.level, done.batch, done.cells, branch=done.branch), True
        return done

    def among(
        self, samples: Sequence[int], index: Tensor | None, call: Callable[[], Any], packing: Packing | None = None
    ) -> Any:
        """Call something while some of the samples are all there is."""
        here = self.here()
        if self._level is not None or len(self.record.clock) > 1:
            self._level = tuple(self.level[i] for i in samples)
        self.samples = tuple(self.samples[i] for i in samples)
        self.index, self.lengths, self.packing = index, None, packing
        try:
            return call()
        finally:
            self.go(here)

    def which(self, places: Sequence[int] | None) -> tuple[int, ...] | None:
        """The samples of the call at some places, or all places, of what is being computed; None if they are all."""
        found = self.samples if places is None else tuple(self.samples[place] for place in places)
        return None if len(found) == self.record.batch else found

    def part_of(
        self, samples: Sequence[int], stack: Stack, named: dict[str, Any], call: Callable[[dict[str, Any]], Any]
    ) -> Any:
        """Call a part of a block on some of the samples alone; while it runs, they are all there is."""
        rows = torch.tensor(samples, device=named[stack.tokens if stack.tokens in named else next(iter(named))].device)
        index = None if self.index is None else self.index.index_select(0, rows)
        given = of_samples(named, rows, self.batch, stack)
        return self.among(samples, index, lambda: call(given))

    def _weighted(self, block: int, given: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        """The effect of the block, as far as learned gates let it through."""
        for gate in self.actors.gates:
            weight = gate.weight(self, block)
            if weight is None:
                continue
            share = weight.view(-1, 1, 1)
            for name, value in results.items():
                if value is not None and given.get(name) is not None:
                    results[name] = torch.lerp(given[name].to(value.dtype), value, share.to(value.dtype))
        return results

    def _split(self, x: Tensor, stack: Stack) -> tuple[Tensor | None, Tensor]:
        """Text and image tokens of what a block gets or returns."""
        return split(x, None if stack.image == "all" else self.count, stack.image)

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to an auxiliary loss of this call."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def per_sample(self, values: Sequence[float], what: str) -> tuple[float, ...]:
        """One value for all samples, or one for each, as one for each.

        Raises:
            InputError: as many as neither.
        """
        if len(values) == 1:
            return tuple(values) * self.batch
        if len(values) != self.batch:
            raise InputError(f"{what} has {len(values)} entries, but the batch holds {self.batch} samples.")
        return tuple(values)


def _results(stack: Stack, out: Any) -> dict[str, Any]:
    """What a block returned, by name."""
    return dict(zip(stack.returns, out if isinstance(out, tuple) else (out,), strict=False))


def _others(named: Mapping[str, Any], stack: Stack, image: int) -> tuple[int, int]:
    """How many tokens a block gets besides image tokens: of text, and of an encoder that it attends to apart."""
    text, context = named.get(stack.text or ""), None
    if stack.products is not None and stack.products.cross:
        context = named.get(stack.products.context)
    beside = named[stack.tokens].shape[1] - image
    return beside + (0 if text is None else text.shape[1]), 0 if context is None else context.shape[1]


def _through(branch: Branch, run: Run, role: Role, call: Callable[..., Any]) -> Callable[..., Any]:
    def through(**named: Any) -> Any:
        return branch.around(run, role, call, named)

    return through
