"""Training: one loop for all recipes, on one device or several, that resumes bit for bit."""

from tokdyn.train.calls import CallResult, CallSettings, distil
from tokdyn.train.loop import EXIT_INTERRUPTED, Preview, Result
from tokdyn.train.plan import Plan, dry_run
from tokdyn.train.session import train

__all__ = [
    "EXIT_INTERRUPTED",
    "CallResult",
    "CallSettings",
    "Plan",
    "Preview",
    "Result",
    "distil",
    "dry_run",
    "train",
]
