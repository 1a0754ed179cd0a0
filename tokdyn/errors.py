"""The errors that a user's input can cause. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class TokdynError(Exception):
    """Base class of the errors that input causes, and not a bug; the command line prints them and exits with 2."""


class UnsupportedModelError(TokdynError):
    """The model has no adapter, or the requested method cannot be attached to it."""


class CompositionError(TokdynError):
    """Methods of one stack cannot be combined."""


class RecipeError(TokdynError):
    """A recipe or a key=value setting is wrong."""


class CheckpointError(TokdynError):
    """A checkpoint is missing, damaged or of an unknown format, or does not match the model."""


class DataError(TokdynError):
    """A data set is missing, empty or holds files that cannot be read."""


class InputError(TokdynError, ValueError):
    """A tensor or an argument has the wrong shape, type or range."""


class OutputError(TokdynError):
    """A file or folder cannot be written: its path is taken by something else, it is protected, or the disk is full."""
