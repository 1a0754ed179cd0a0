"""Training: one loop for all recipes, on one device or several, that resumes bit for bit."""

from tokdyn.train.loop import EXIT_INTERRUPTED, Result, train

__all__ = ["EXIT_INTERRUPTED", "Result", "train"]
