"""Call a model beside its trajectory: to count FLOPs, to calibrate methods, to compare times, to draw in a callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokdyn.attach.attachment import Attachment, Meter
from tokdyn.attach.class_swap import detach
from tokdyn.attach.entry import attach_sites, attached, attachment_of, unwrap, wrap
from tokdyn.trace.memory import Memory
from tokdyn.trace.trajectory import Trajectory
from tokdyn.watching import Watch


@contextmanager
def untraced(attachment: Attachment) -> Iterator[None]:
    """Restore history, losses, trajectory and caches afterwards, as if the calls made meanwhile had not happened.

    These calls continue the current trajectory and use what is cached.
    """
    history, losses, trajectory = list(attachment.history), attachment.losses, attachment.trajectory
    watch, attachment.watch = attachment.watch, Watch.over_nothing()
    memories = [(cache, cache.memory) for cache in attachment.caches]
    attachment.trajectory = trajectory.fork()
    for cache, memory in memories:
        cache.memory = memory.fork()
    try:
        yield
    finally:
        attachment.history, attachment.losses, attachment.trajectory = history, losses, trajectory
        attachment.watch = watch
        for cache, memory in memories:
            cache.memory = memory


@contextmanager
def metered(model: nn.Module, meter: Meter) -> Iterator[Attachment]:
    """Trace calls of a model and count their FLOPs, whether it is wrapped, disabled or not wrapped at all.

    Args:
        model: restored afterwards. If its methods are disabled, it computes without them here too.
        meter: the counter and the arguments of the calls.

    Yields:
        The attachment that records the calls.
    """
    attachment = attachment_of(model)
    if attachment is None:
        wrap(model, [])
    elif not attachment.enabled or not attachment.methods:
        model.tokdyn = Attachment(model, attachment.adapter, [])
    recording = attachment_of(model)
    assert recording is not None
    bare = attachment is None or not attachment.methods  # calls of its blocks do not go through the engine yet
    if bare:
        attach_sites(model, recording)
    recording.meter = meter
    try:
        yield recording
    finally:
        recording.meter = None
        if attachment is None:
            unwrap(model)
        else:
            model.tokdyn = attachment
            for block in recording.blocks(model) if bare else []:
                detach(block)


@contextmanager
def trajectory_apart(attachment: Attachment) -> Iterator[None]:
    """Set a trajectory that is under way aside while the context is open, and let it go on afterwards.

    A callback that draws with the same model begins a trajectory within another. Caches and statistics of the outer one
    are those from before, and statistics of the inner one are gone, unless the outer one has made no call yet.
    """
    outer = attachment.trajectory
    if outer.calls is None:
        outer.calls = 0
        try:
            yield
        finally:
            outer.calls = None
        return
    memories, sampler = [(cache, cache.memory) for cache in attachment.caches], attachment.watch.sampler
    history = list(attachment.history)
    attachment.trajectory = Trajectory()
    attachment.trajectory.calls = 0
    attachment.watch.sampler = None
    for cache, _ in memories:
        cache.memory = Memory()
    try:
        yield
    finally:
        attachment.trajectory, attachment.watch.sampler = outer, sampler
        if outer.calls:
            attachment.history[:] = history
        for cache, memory in memories:
            cache.memory = memory


@contextmanager
def beside_dense(model: nn.Module) -> Iterator[None]:
    """Make every call in sampling a second time without methods while the context is open, to compare their times.

    `tokdyn.stats` then says how much faster the calls are than without methods, measured under the same conditions.
    The results are those of the calls with methods; sampling takes as long as both.

    Raises:
        InputError: the model is not wrapped. A call raises one if a cache of diffusers is enabled.
    """
    attachment = attached(model)
    before = attachment.settings.beside_dense
    attachment.set(beside_dense=True)
    try:
        yield
    finally:
        attachment.set(beside_dense=before)
