"""The laws that hold for every method on every model, as functions for the tests of your own methods and adapters.

`check_method` holds one method to them on one model, `check_adapter` every method that fits a model. What fails raises
an `AssertionError` that says which law is broken and by how much.
"""

from tokdyn.testing.checks import check_adapter, check_method
from tokdyn.testing.laws import LAWS, Case

__all__ = ["LAWS", "Case", "check_adapter", "check_method"]
