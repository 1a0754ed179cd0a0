"""Train recipes on one device or several, with runs that resume bit for bit."""

from tokdyn.train.estimate import Estimate, dry_run
from tokdyn.train.loop import EXIT_INTERRUPTED, Preview, Result
from tokdyn.train.session import train

__all__ = [
    "EXIT_INTERRUPTED",
    "Estimate",
    "Preview",
    "Result",
    "dry_run",
    "train",
]
