"""Call a model without changing its statistics and caches, to count its FLOPs or to calibrate its methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokdyn.attach.attachment import Attachment, Meter
from tokdyn.attach.class_swap import detach
from tokdyn.attach.entry import attach_sites, attachment_of, unwrap, wrap
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
