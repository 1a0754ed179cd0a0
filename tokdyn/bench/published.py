"""Compare the costs printed in arXiv 2603.06351 with computed ones (`tokdyn bench flops --paper`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokdyn.bench.flops import named_model
from tokdyn.bench.settings import FlopsConfig
from tokdyn.cost import flops_per_image
from tokdyn.models import DCDiT, DiT

STEPS = 250  # sampling steps per image in all rows


@dataclass(frozen=True)
class Published:
    """One printed row, for images of 256 x 256 pixels sampled in 250 steps.

    Attributes:
        model: name of the model, as in `tokdyn models`.
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


# From arXiv 2603.06351 v2. The paper does not print the mean kept share before tail drop.
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


def compare_with_paper(config: FlopsConfig) -> list[dict[str, Any]]:
    """Compare the costs printed in arXiv 2603.06351 with the computed ones, row by row of its tables.

    The paper does not print the kept share of its models. It is assumed to be `config.kept`, or 1/N if that is None.

    Args:
        config: the kept share, the target N and the input size; other settings are ignored.

    Returns:
        One dict per row: model, tail drops, printed and computed TFLOPs per image and their difference, "kept" (the
        assumed kept share before tail drop), and "implied_kept" (the one for which the computed cost equals the printed
        one).
    """
    rows: list[dict[str, Any]] = []
    for printed in ROWS:
        model = named_model(config, printed.model)
        natural = (config.kept or 1.0 / config.target) if printed.tail_drop is not None else None
        computed = _published_cost(model, printed, natural)
        rows.append(
            {
                "model": printed.model,
                "tail_drop": printed.tail_drop,
                "uncond_tail_drop": printed.uncond_tail_drop,
                "guided": printed.guided,
                "printed": printed.tflops,
                "computed": round(computed, 3),
                "difference": f"{computed / printed.tflops - 1:+.2%}",
                "kept": natural,
                "implied_kept": None if natural is None else round(_implied_kept(model, printed), 4),
            }
        )
    return rows


def paper_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the columns of the comparison by title, each with one text per row of `compare_with_paper`."""
    in_gflops = {"printed": "printed, GFLOPs/image", "computed": "computed, GFLOPs/image"}
    table = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        texts = [f"{1e3 * value:,.0f}" for value in values] if name in in_gflops else map(_text, values)
        table[in_gflops.get(name, name)] = list(texts)
    return table


def _text(value: Any) -> str:
    """Return a value as text, "-" for None."""
    return "-" if value is None else str(value)


def _published_cost(model: DiT | DCDiT, printed: Published, natural: float | None) -> float:
    """Compute the TFLOPs per image of a printed row, for a kept share before tail drop (None for a DiT)."""
    kept, unconditional = None, 1.0 if printed.guided else None
    if natural is not None:
        kept = natural * (1.0 - (printed.tail_drop or 0.0))
        if printed.guided:
            unconditional = natural * (1.0 - (printed.uncond_tail_drop or 0.0))
    return flops_per_image(model, kept, unconditional) * STEPS / 1e12


def _implied_kept(model: DiT | DCDiT, printed: Published) -> float:
    """Find by bisection the kept share before tail drop for which the computed cost equals the printed one."""
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _published_cost(model, printed, middle) < printed.tflops else (low, middle)
    return (low + high) / 2
