"""Check your own methods and adapters against the laws that hold for every method on every model.

`check_method` checks one method on one model, and `check_adapter` an adapter with every method that can be attached to
its model. A broken law raises an `AssertionError` that names the law and says by how much it is broken. `LAWS` are the
laws as functions of a `Case`.
"""

from tokdyn.testing.checks import check_adapter, check_method
from tokdyn.testing.laws import LAWS, Case

__all__ = ["LAWS", "Case", "check_adapter", "check_method"]
