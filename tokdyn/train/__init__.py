"""Training: one loop for all recipes, on one device or several, that resumes bit for bit."""

from tokdyn.train.estimate import Plan, dry_run
from tokdyn.train.loop import EXIT_INTERRUPTED, Preview, Result
from tokdyn.train.session import train

__all__ = [
    "EXIT_INTERRUPTED",
    "Plan",
    "Preview",
    "Result",
    "dry_run",
    "train",
]
