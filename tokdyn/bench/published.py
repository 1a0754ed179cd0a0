"""Costs printed in papers, which `tokdyn bench flops --paper` compares with the computed ones."""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 250  # model calls per image in all rows


@dataclass(frozen=True)
class Published:
    """One printed row: an image of 256 pixels in 250 steps.

    Attributes:
        model: named as in `tokdyn models`.
        tflops: 1e12 FLOPs per image; a multiply-add is 2.
        tail_drop: tail drop of the conditional branch; None for a DiT.
        uncond_tail_drop: tail drop of the unconditional branch under Lite-CFG; None without guidance.
        guided: whether both guidance branches are computed.
    """

    model: str
    tflops: float
    tail_drop: float | None = None
    uncond_tail_drop: float | None = None
    guided: bool = False


# arXiv 2603.06351 v2; a multiply-add is 2 FLOPs. The paper does not print the mean kept share before tail drop.
ROWS = (
    Published("DiT-S/2", 3.02),
    Published("DiT-B/2", 11.46),
    Published("DiT-L/2", 40.21),
    Published("DiT-XL/2", 59.00),
    Published("DC-DiT-S", 3.06, 0.2),
    Published("DC-DiT-S", 2.14, 0.5),
    Published("DC-DiT-B", 11.94, 0.2),
    Published("DC-DiT-B", 8.55, 0.5),
    Published("DC-DiT-L", 39.61, 0.1),
    Published("DC-DiT-L", 31.86, 0.3),
    Published("DC-DiT-XL", 62.99, 0.0),
    Published("DC-DiT-XL", 51.60, 0.2),
    Published("DC-DiT-XL", 40.26, 0.4),
    Published("DiT-S/2", 6.04, guided=True),
    Published("DiT-B/2", 22.93, guided=True),
    Published("DiT-L/2", 80.41, guided=True),
    Published("DiT-XL/2", 118.13, guided=True),
    Published("DC-DiT-S", 4.73, 0.0, 0.9, guided=True),
    Published("DC-DiT-B", 18.38, 0.0, 0.9, guided=True),
    Published("DC-DiT-L", 52.88, 0.0, 0.9, guided=True),
    Published("DC-DiT-XL", 76.13, 0.0, 0.9, guided=True),
)

MATCHED_STEPS = {"DC-DiT-S": 421_230, "DC-DiT-B": 408_071, "DC-DiT-L": 486_372, "DC-DiT-XL": 494_943}
"""Training steps that cost as much as 400,000 steps of the DiT of the same size (arXiv 2603.06351 v2)."""
