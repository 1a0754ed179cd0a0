"""Time and FLOPs of every preset of two models on CPU: `python -m benchmarks.preset_times --out results.json`.

The presets of FLUX.1-dev on a Flux of 4 double and 8 single blocks and 96 tokens, and those of Wan2.1-T2V-1.3B on a Wan
of 8 blocks and 128 tokens, both of width 768 with random weights, through the steps that each preset is published for.
What a preset costs is measured here, and not what it does to an image: random weights change differently from step to
step, so a rule with a threshold computes other steps than on real ones. Prints how many steps are computed, FLOPs (a
multiply-add is 2) and seconds beside the plain model. Takes about ten minutes.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import truediv
from typing import Any

import torch

import tokdyn
from benchmarks import command_line, markdown
from benchmarks.caching import flux
from benchmarks.trajectories import Calls, Case, Side, flux_calls, in_rounds, spent, through, told, wan, wan_calls
from tokdyn.bench.timing import machine, write
from tokdyn.methods import Method
from tokdyn.presets import families

USUAL_STEPS = 50
"""Steps of a trajectory for which a preset names none."""


def with_preset(case: Case, methods: Sequence[Method]) -> Side:
    """Attach methods, for whose model this one stands in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its size is another
        return told(tokdyn.wrap(case.build(), methods), case.calls)


def measured(model: torch.nn.Module, calls_of: Callable[[int], Calls], name: str, rounds: int) -> list[dict[str, Any]]:
    """Time and count every preset of a model, in turn with the plain model at equal steps.

    Args:
        model: stands in for the named one.
        calls_of: returns the calls of a trajectory of so many steps.
        name: the model whose presets these are.
        rounds: trajectories of each that are timed.
    """
    (entry,) = (entry for family in families() for entry in family.models if entry.name == name)
    rows = []
    for setting, given in entry.settings.items():
        steps = given.steps or USUAL_STEPS
        case = Case(model, calls_of(steps))
        sides = {
            "plain": through(case.build(), case.calls),
            "preset": with_preset(case, tokdyn.preset(name, setting)),
        }
        times = in_rounds({key: side.run for key, side in sides.items()}, rounds)
        flops = {key: spent(side) for key, side in sides.items()}
        rows.append({
            "preset": setting, "steps": steps, "computed": len(sides["preset"].computed),
            **{f"{key}_ms": statistics.median(each) for key, each in times.items()},
            **{f"{key}_gflops": each / 1e9 for key, each in flops.items()},
            "share": statistics.median(map(truediv, times["preset"], times["plain"])),
        })  # fmt: skip
        print(f"{name}, {setting}: {rows[-1]['computed']} of {steps} steps, {rows[-1]['share']:.3f} of the time")
    return rows


def table(result: Mapping[str, Any]) -> str:
    """Format the measurements in Markdown; a multiply-add is 2 FLOPs."""
    head = ["model", "preset", "computed", "GFLOPs", "of plain", "s", "of plain"]
    lines = [
        [
            name, row["preset"], f"{row['computed']} of {row['steps']}", f"{row['preset_gflops']:.0f}",
            f"{row['preset_gflops'] / row['plain_gflops']:.2f}", f"{row['preset_ms'] / 1e3:.2f}", f"{row['share']:.2f}",
        ]
        for name, rows in result["models"].items()
        for row in rows
    ]  # fmt: skip
    return markdown.table(head, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and save on request."""
    options = command_line.start(command_line.parser(__doc__, rounds=3).parse_args(argv))
    torch.manual_seed(0)
    models = {
        "FLUX.1-dev": (flux(4, 8, 12), lambda steps: flux_calls(8, steps=steps)),
        "Wan2.1-T2V-1.3B": (wan(8, 8), lambda steps: wan_calls(2, 8, steps=steps)),
    }
    found = {name: measured(model, calls, name, options.rounds) for name, (model, calls) in models.items()}
    result = {"machine": machine(), "rounds": options.rounds, "models": found}
    print(table(result))
    if options.out:
        write(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
