"""The named models have the published numbers of parameters, the fixed position table included."""

from __future__ import annotations

import pytest
import torch

from tokdyn.models import DCDiT, DiT


@pytest.mark.parametrize(("name", "millions"), [("S", 34.76), ("B", 137.13), ("L", 469.61), ("XL", 689.59)])
def test_chunking_models(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = DCDiT.named(name)
    assert round(sum(value.numel() for value in model.state_dict().values()) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "millions"), [("S/2", 33), ("B/2", 131), ("L/2", 459), ("XL/2", 675)])
def test_fixed_patch_models(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = DiT.named(name)
    # The papers give whole millions, rounded up or down.
    assert sum(value.numel() for value in model.state_dict().values()) / 1e6 == pytest.approx(millions, abs=1)


def test_the_public_count_of_the_largest() -> None:
    """As the public DiT code reports it for DiT-XL/2 on a 32x32 latent."""
    with torch.device("meta"):
        model = DiT.named("XL/2")
    assert sum(value.numel() for value in model.state_dict().values()) == 675_129_632
