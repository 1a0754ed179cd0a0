"""The handlers of the methods, those of one method in each file; see `tokdyn.attach.handlers.base`."""

import importlib
import pkgutil


def load_handlers() -> None:
    """Import every file of this folder, so that its handlers are registered."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
