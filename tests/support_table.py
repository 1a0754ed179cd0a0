"""The matrix of classes and methods in docs/adapters.md. `python tests/support_table.py` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from tokdyn.catalog import classes, families
from tokdyn.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
PART = re.compile(r"(<!-- support:.*?-->\n)(.*?)(\n+<!-- end)", re.DOTALL)


def markdown() -> str:
    """A row for each class of each family, and for each class of diffusers that has none."""
    header = ["family", "class", *METHODS, "why not"]
    rows = [header, ["---"] * len(header)]
    for family in families():
        why = "; ".join(dict.fromkeys(family.refused.values()))
        rows += [[family.name, f"`{name}`", *family.methods.values(), why] for name in family.classes]
    rows += [["", f"`{each.name}`", *each.methods.values(), each.reason] for each in classes()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(PART.sub(lambda found: found[1] + markdown() + found[3], PAGE.read_text()))
