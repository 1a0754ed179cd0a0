"""`tokdyn models` agrees with the papers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests import catalog_file
from tests.test_imports import MODEL_CODE, loaded_after
from tokdyn.catalog import SHIPPED, CatalogSettings, catalog


def test_sizes_and_costs_are_as_published() -> None:
    """Millions of parameters with the position table, and GFLOPs where a multiply-add is 2 (arXiv 2603.06351)."""
    found = {(entry.kind, entry.name): entry for entry in catalog(CatalogSettings())}
    millions = {name: round(found["dcdit", f"DC-DiT-{name}"].parameters / 1e6, 2) for name in ("S", "B", "L", "XL")}
    assert millions == {"S": 34.76, "B": 137.13, "L": 469.61, "XL": 689.59}
    gflops = {name: round(found["dit", f"DiT-{name}"].gflops, 2) for name in ("S/2", "B/2", "L/2", "XL/2", "XL/4")}
    assert gflops == {"S/2": 12.11, "B/2": 46.01, "L/2": 161.40, "XL/2": 237.24, "XL/4": 58.09}


def test_tail_drop_lowers_cost_and_kept_tokens() -> None:
    full, lean = (catalog(CatalogSettings(sample_size=16, tail_drop=drop)) for drop in (0.0, 0.5))
    for before, after in zip(full, lean, strict=True):
        if before.kind == "dcdit":
            assert after.computed == before.computed / 2
            assert after.gflops < before.gflops
        else:
            assert after == before


def test_patch_sizes_that_do_not_divide_the_input_are_left_out() -> None:
    assert {e.name for e in catalog(CatalogSettings(sample_size=18)) if e.kind == "dit"} == {
        f"DiT-{size}/2" for size in ("tiny", "S", "B", "L", "XL")
    }


def test_settings_are_strict() -> None:
    with pytest.raises(ValidationError):
        CatalogSettings(patch=2)  # type: ignore[call-arg]


def test_the_shipped_catalog_is_what_the_code_gives() -> None:
    """`python tests/catalog_file.py` writes it anew."""
    assert SHIPPED.read_text(encoding="utf-8") == catalog_file.text()


def test_models_methods_and_presets_are_listed_without_torch() -> None:
    statements = [
        "from typer.testing import CliRunner",
        "from tokdyn.cli.main import app",
        *(f"assert CliRunner().invoke(app, ['{word}']).exit_code == 0" for word in ("models", "methods", "presets")),
    ]
    assert not loaded_after("; ".join(statements)) & (MODEL_CODE | {"torch"})
