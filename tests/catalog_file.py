"""What `tokdyn models`, `methods` and `presets` list without torch. `python tests/catalog_file.py` writes it anew."""

from __future__ import annotations

from tokdyn.cli.settings import rows

from tokdyn import catalog
from tokdyn.methods import METHODS


def text() -> str:
    """The content of tokdyn/catalog.json as the code gives it."""
    own = {name: dict(rows(kind)) for name, kind in METHODS.items() if kind.__module__.startswith("tokdyn.")}
    return catalog.to_json(catalog.computed(own))


if __name__ == "__main__":
    catalog.SHIPPED.write_text(text(), encoding="utf-8")
