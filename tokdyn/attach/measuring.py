"""Calls of a wrapped model that leave no trace, to measure it or to calibrate what it carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokdyn.attach.attachment import Attachment, Meter
from tokdyn.attach.class_swap import detach
from tokdyn.attach.entry import attach_sites, attachment_of, unwrap, wrap


@contextmanager
def untraced(attachment: Attachment) -> Iterator[None]:
    """Let calls of the model see the trajectory and the caches as they are, and leave them so."""
    history, losses, trajectory = attachment.history, attachment.losses, attachment.trajectory
    watch, attachment.watch = attachment.watch, None
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
    """Let calls of a model be traced while their FLOPs are counted, whether it is wrapped, disabled or neither."""
    attachment = attachment_of(model)
    if attachment is None:
        wrap(model, [])
    elif not attachment.enabled or not attachment.methods:
        model.tokdyn = Attachment(model, attachment.adapter, [])
    tracing = attachment_of(model)
    assert tracing is not None
    bare = attachment is None or not attachment.methods  # calls of its blocks do not go through the engine yet
    if bare:
        attach_sites(model, tracing)
    tracing.meter = meter
    try:
        yield tracing
    finally:
        tracing.meter = None
        if attachment is None:
            unwrap(model)
        else:
            model.tokdyn = attachment
            for block in tracing.blocks(model) if bare else []:
                detach(block)
