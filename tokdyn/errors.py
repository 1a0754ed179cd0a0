"""The errors that a user can cause; each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class TokdynError(Exception):
    """Base of every error that input causes and not a bug; the command line prints it and exits with 2."""


class UnsupportedModelError(TokdynError):
    """The model is not one that the requested method can be attached to."""


class CompositionError(TokdynError):
    """The methods cannot be combined in this list."""


class RecipeError(TokdynError):
    """A recipe or a key=value setting is wrong."""


class CheckpointError(TokdynError):
    """A checkpoint is missing, damaged or of an unknown format, or does not match the model."""


class DataError(TokdynError):
    """A data set is missing, empty or holds files that cannot be read."""


class InputError(TokdynError, ValueError):
    """A tensor or an argument has the wrong shape, type or range."""


class OutputError(TokdynError):
    """A file or folder cannot be written: it is of another kind or protected, or the disk is full."""
