"""Tell the denoisers of a pipeline the trajectory that its calls belong to, from its scheduler and its guiders.

While a pipeline is called, the class of its scheduler is swapped for a subclass whose `step` counts and whose
`set_timesteps` begins a trajectory. Every entry of the timesteps is a step, so that a sampler of second order has two
for each of its own. Until the scheduler has made its first step nothing is told, because some pipelines step by
themselves; the calls until then are those of one step. Guiders of modular pipelines say which prediction comes next.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach import Attachment
from tokdyn.trace.branches import BOTH, COND, PERTURBED, UNCOND, Branch, standard

_STEPS = "_num_timesteps"  # where diffusers' pipelines keep the number of timesteps of their loop
_IDENTIFIER = "__guidance_identifier__"  # where diffusers' guiders keep the name of a prediction
Reports = dict[str, Callable[..., None]]
_MOST_PARTS = 3  # of a batch: unconditional, conditional, perturbed


class Teller:
    """Tells the steps and the guidance branches of one call of a pipeline.

    Args:
        pipe: the pipeline.
        attachments: those of its denoisers, by the names of their components.
        guided: whether the call is guided, as its arguments say; None where they do not.
    """

    def __init__(self, pipe: Any, attachments: Mapping[str, Attachment], guided: bool | None = None) -> None:
        self._guided = guided
        self._pipe, self._attachments, self._names = pipe, tuple(attachments.values()), tuple(attachments)
        self._scheduler = pipe.components.get("scheduler")
        self._made = 0
        self._called = self._by_copy = False  # since a step was counted last; by a copy of the scheduler
        self._images: int | None = None  # images of a batch, from the first call on
        self._predictions: list[str] = []  # what a guider is about to ask for
        self._prediction: str | None = None

    def begin(self, *_: Any, **__: Any) -> None:
        """Begin a trajectory in every denoiser."""
        self._made, self._images, self._called, self._by_copy = 0, None, False, False
        for attachment in self._attachments:
            attachment.end()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Let the denoisers ask which branches a call is about while the context is open."""
        before = [each.trajectory.asks for each in self._attachments]
        for name, each in zip(self._names, self._attachments, strict=True):
            answer = functools.partial(self._branches, each.adapter.halves, each.adapter.guidance)
            each.trajectory.asks = self._unconditional if name.startswith(UNCOND) else answer
        try:
            yield
        finally:
            for each, asks in zip(self._attachments, before, strict=True):
                each.trajectory.asks = asks

    def stepped_copy(self, *args: Any, **kwargs: Any) -> None:
        """Go on to the next step with a copy of the scheduler, of which there may be several, such as one a frame."""
        if self._called:
            self._by_copy = True
            self.stepped(*args, **kwargs)

    def stepped(self, _: Any, *args: Any, **kwargs: Any) -> None:
        """Go on to the next step, or end the trajectory after its last one; arguments are those of the scheduler."""
        if self._by_copy and not self._called:
            return
        self._called = False
        sample = kwargs.get("sample", args[2] if len(args) > 2 else None)
        batch = len(sample) if isinstance(sample, Tensor) and sample.dim() else 0
        if self._images is not None and 0 < batch < self._images and self._images % batch == 0:
            self._images = batch  # never more, since the sample of some pipelines holds both branches
        self._made += 1
        steps = self._number_of_steps()
        if steps is not None and self._made >= steps:
            by_copy = self._by_copy
            self.begin()
            self._by_copy = by_copy
            return
        for attachment in self._attachments:
            attachment.trajectory.step, attachment.trajectory.steps = self._made, steps

    def planned(self, batches: Any, *_: Any, **__: Any) -> None:
        """Note the predictions that a guider asks for in a step, in order."""
        names = [getattr(batch, _IDENTIFIER, None) for batch in batches]
        self._predictions, self._prediction = [name for name in names if isinstance(name, str)], None

    def next_prediction(self, *_: Any, **__: Any) -> None:
        """Note that the calls to come are those of the next prediction of a guider."""
        self._prediction = self._predictions.pop(0) if self._predictions else None

    def _number_of_steps(self) -> int | None:
        """Return how many steps the loop has: what the pipeline says, or what is left to the scheduler at its start.

        Some pipelines say the number of all steps of several loops. Some give each frame steps of its own.
        """
        told, timesteps = getattr(self._pipe, _STEPS, None), getattr(self._scheduler, "timesteps", None)
        if timesteps is not None and not (self._by_copy and told is not None):
            left = len(timesteps) - (getattr(self._scheduler, "begin_index", None) or 0)
            told = left if told is None else min(told, left)
        return told if told is None or told >= self._made else None

    def _unconditional(self, name: Branch | None, x: Tensor) -> Branch:
        """Say that a call is about the unconditional branch, for which some pipelines have a model of its own."""
        self._called = True
        return UNCOND

    def _branches(self, halves: tuple[str, str], guidance: str, name: Branch | None, x: Tensor) -> Branch | None:
        """Say which branches a call is about.

        Args:
            halves: the order of two branches in a batch.
            guidance: how pipelines call models of this family.
            name: what the pipeline has named.
            x: (B, ...) the input of the call.
        """
        self._called = True
        if self._prediction is not None:
            return standard(self._prediction)
        if name and name != BOTH:
            return name
        perturbed = bool(getattr(self._pipe, "do_perturbed_attention_guidance", False))
        if self._images is None:
            self._images = len(x) // self._parts(x, perturbed, guidance == "calls")
        parts = len(x) // self._images if len(x) % self._images == 0 else 0
        if parts == 1:
            return COND if name else ()
        if perturbed and parts == _MOST_PARTS:
            return *halves, PERTURBED
        return ((COND, PERTURBED) if perturbed else halves) if parts == len(halves) else name

    def _parts(self, x: Tensor, perturbed: bool, calls: bool) -> int:
        """Count the branches in the first batch: equal parts of the input, as each branch gets the same latents.

        Args:
            x: (B, ...) the input.
            perturbed: whether the pipeline says that a branch is perturbed.
            calls: whether pipelines of this family call the model for each branch.
        """
        guided = getattr(self._pipe, "do_classifier_free_guidance", self._guided)
        if not perturbed and (calls or guided is False):
            return 1
        for parts in range(_MOST_PARTS if perturbed else 2, 1, -1):
            if len(x) % parts == 0 and all(torch.equal(x[: len(x) // parts], each) for each in x.chunk(parts)[1:]):
                return parts
        return 1


class _Alike(type):
    """The class of a class that equals its base: a pipeline of diffusers compares the class of its scheduler (Bria)."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    __hash__ = type.__hash__  # tables of classes tell them apart


@contextmanager
def listening(components: dict[str, Any], teller: Teller) -> Iterator[None]:
    """Let the scheduler and the guiders of a pipeline report to a teller while the context is open."""
    scheduler = components.get("scheduler")
    with ExitStack() as stack:
        stack.enter_context(teller.asked())
        if scheduler is not None:
            reports = {"step": teller.stepped, "set_timesteps": teller.begin}
            stack.enter_context(_reporting(scheduler, reports, {"step": teller.stepped_copy}))
        for each in components.values():
            if hasattr(each, "prepare_inputs_from_block_state") and hasattr(each, "prepare_models"):
                plans = dict.fromkeys(("prepare_inputs", "prepare_inputs_from_block_state"), teller.planned)
                stack.enter_context(_reporting(each, {**plans, "prepare_models": teller.next_prediction}))
        yield


@contextmanager
def _reporting(owner: Any, reports: Reports, of_copies: Reports | None = None) -> Iterator[None]:
    """Let methods of one object, and of copies that are made meanwhile, report what they return and their arguments.

    Afterwards the object and its copies have their class again.
    """
    base: Any = type(owner)
    listens = [True]
    made: list[weakref.ref[Any]] = []

    @functools.wraps(base.__init__)  # whose arguments are those of the class
    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """Make an object of the subclass, as copying does, and remember it."""
        plain = base.__new__ is object.__new__
        each = object.__new__(cls) if plain else base.__new__(cls, *args, **kwargs)
        made.append(weakref.ref(each))
        return each

    def reporting(name: str, report: Callable[..., None]) -> Callable[..., Any]:
        original, of_copy = getattr(base, name), (of_copies or {}).get(name)

        @functools.wraps(original)  # pipelines ask which arguments it takes
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = original(self, *args, **kwargs)
            if self is owner:
                report(out, *args, **kwargs)
            elif of_copy is not None and listens:
                of_copy(out, *args, **kwargs)
            return out

        return method

    names = {name: reporting(name, report) for name, report in reports.items() if hasattr(base, name)}
    about = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    kind: Any = _Alike if type(base) is type else type(base)
    owner.__class__ = reports_to = kind(base.__name__, (base,), {**about, **names, "__new__": new})
    try:
        yield
    finally:
        listens.clear()
        for each in (owner, *(reference() for reference in made)):
            if type(each) is reports_to:
                each.__class__ = base
