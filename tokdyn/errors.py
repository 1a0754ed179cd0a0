"""The errors a user can cause. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class TokdynError(Exception):
    """Base of every error caused by input rather than by a bug; the command line prints it and exits with 2."""


class UnsupportedModelError(TokdynError):
    """The model is not one that the requested method can be attached to."""


class CompositionError(TokdynError):
    """The methods cannot be combined as listed."""


class RecipeError(TokdynError):
    """A recipe or a key=value setting is wrong."""


class CheckpointError(TokdynError):
    """A checkpoint is missing, damaged, of an unknown format or does not match the model."""


class DataError(TokdynError):
    """A data set is missing, empty or holds files that cannot be read."""


class InputError(TokdynError, ValueError):
    """A tensor or an argument given to a function or a model has the wrong shape, type or range."""


class OutputError(TokdynError):
    """A file or folder cannot be written: it is something else, is protected, or the disk is full."""
