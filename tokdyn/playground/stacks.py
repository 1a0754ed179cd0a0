"""Attach the methods that a user has typed for one picture, and put the model back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tokdyn.adapters.clock import told_level
from tokdyn.attach import Attachment, attachment_of
from tokdyn.calibration.after_training import rewrap
from tokdyn.errors import RecipeError
from tokdyn.files import user_path
from tokdyn.methods import FeatureCache, Method
from tokdyn.methods.registry import from_settings
from tokdyn.pipelines import is_pipeline, is_wrapped, load, unwrap, wrap
from tokdyn.playground.words import read_methods

COUNTED = FeatureCache(threshold=0.0)
"""A method that never acts. With it, `tokdyn.stats` counts what a pipeline computes without methods."""

Methods = list[Method] | dict[str, list[Method]] | str | Path
"""Methods for a model, for each denoiser of a pipeline, a preset by name, or a folder or preset file."""


def methods_of(text: str) -> Methods:
    """Build the methods that a user has typed, in the words that `read_methods` reads.

    Raises:
        RecipeError, InputError: they are no methods, or a setting of one of them is wrong.
    """
    found = read_methods(text)
    if isinstance(found, str):
        path = user_path(found)
        return path if path.exists() else found
    if isinstance(found, dict):
        return {name: [from_settings(each) for each in some] for name, some in found.items()}
    return [from_settings(each) for each in found]


@contextmanager
def acting(target: Any, text: str) -> Iterator[None]:
    """Attach methods to a model or pipeline while the context is open.

    A list is put around the methods that a model was trained with, and a folder or a preset takes their place. Without
    methods, a pipeline gets one that never acts, so that its costs are counted.

    Args:
        target: a model, wrapped or not, or a pipeline without methods.
        text: methods, in the words that `read_methods` reads.

    Raises:
        TokdynError: they are no methods, or cannot be attached; the target is as before then.
    """
    methods = methods_of(text)
    before = None if is_pipeline(target) else attachment_of(target)
    try:
        _attach(target, methods)
        yield
    finally:
        if is_pipeline(target):
            if is_wrapped(target):
                unwrap(target)
        elif attachment_of(target) is not before:
            _put_back(target, before)


def _attach(target: Any, methods: Methods) -> None:
    if is_pipeline(target):
        if isinstance(methods, Path):
            load(target, methods)
        else:
            wrap(target, methods or [COUNTED])
    elif isinstance(methods, dict):
        raise RecipeError("methods by denoiser are for pipelines; give a model one list.")
    elif isinstance(methods, list):
        if methods:
            rewrap(target, methods)
    else:
        if attachment_of(target) is not None:
            unwrap(target)
        if isinstance(methods, Path):
            load(target, methods)
        else:
            wrap(target, methods)


def _put_back(model: nn.Module, before: Attachment | None) -> None:
    """Give a model the methods that it was trained with, whose parts keep their weights; or none, as before."""
    if attachment_of(model) is not None:
        unwrap(model)
    if before is not None:
        wrap(model, before.methods, told_level(before.adapter))
        again = attachment_of(model)
        assert again is not None
        again.parts.load_state_dict(before.parts.state_dict())
