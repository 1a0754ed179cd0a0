"""What this version costs beside an older one, and an empty wrap beside the plain model.

    python -m benchmarks.overhead --against REVISION --out benchmarks/results/overhead-cpu.json

REVISION is a revision of this repository, or a folder that holds an older `tokdyn`. Its package is copied under another
name, so that both versions run in one process on equal weights and inputs, in turn. The models are built several times,
in both orders, since the time of a short call depends on where its weights lie. A ratio is the median over rounds of
new time / old time, and its range holds the true median with 95% probability. A cached step is one that FeatureCache
reuses; every step moves the latents and lowers the noise level; it is told where the loop says which step it is at, as
a wrapped pipeline does. `--only NAME` measures the rows whose name contains it and keeps the other rows of --out, so
that the benchmark can be run in pieces. On a machine that others use, `--clock cpu` counts the processor time of all
threads in place of time. Exits with 1 if a whole range lies above its limit.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokdyn
from benchmarks import command_line
from tokdyn.bench import timing
from tokdyn.errors import InputError

OLD = "tokdyn_before"  # the name that the older package gets
LIMITS = {"empty": 1.01, "other": 1.02}
BUILDS = 4  # times that both models of a row are built: where their weights lie changes a short call by some per cent
BATCH, WIDTH, HEADS, DEPTH = 2, 384, 6, 12  # DiT-S/2

Side = Callable[[], Callable[[], Any]]
"""Prepares the next call, untimed, and returns it."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: of the row.
        build: makes a side: the older version where the argument is true, this one otherwise.
        limit: largest ratio of times that is accepted.
        share: of the rounds that are measured; slow calls need fewer.
    """

    name: str
    build: Callable[[bool], Side]
    limit: float = LIMITS["other"]
    share: float = 1.0


def load_older(against: str, folder: Path) -> Any:
    """Import an older tokdyn under the name `tokdyn_before`.

    Args:
        against: a folder that holds it, or a revision of this repository.
        folder: that the renamed copy is written to.

    Raises:
        InputError: neither a folder with a package nor a revision.
    """
    source = Path(against)
    if not source.is_dir():
        archive = folder / "older.tar"
        root = Path(__file__).parents[1]
        made = subprocess.run(
            ["git", "-C", str(root), "archive", "-o", str(archive), against, "tokdyn"], capture_output=True, text=True
        )
        if made.returncode:
            raise InputError(
                f"--against {against} is neither a folder nor a revision of this repository: {made.stderr.strip()}"
            )
        source = folder / "older"
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
    if not (source / "tokdyn" / "__init__.py").is_file():
        raise InputError(f"--against {against}: expected a folder that holds the package tokdyn.")
    for path in sorted((source / "tokdyn").rglob("*.py")):
        copy = folder / OLD / path.relative_to(source / "tokdyn")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r"\btokdyn\b", OLD, path.read_text()))
    sys.path.insert(0, str(folder))
    return importlib.import_module(OLD)


def dit(size: int = 32) -> nn.Module:
    """Build a DiT-S/2 of diffusers with random weights."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=DEPTH, in_channels=4, out_channels=4,
        sample_size=size, patch_size=2,
    )  # fmt: skip


def flux() -> nn.Module:
    """Build a Flux of 4 double and 8 single blocks with random weights, as wide as that DiT."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=64, pooled_projection_dim=32, axes_dims_rope=(8, 28, 28),
    )  # fmt: skip


def dit_inputs(size: int = 32) -> dict[str, Tensor]:
    """Build the inputs of a DiT."""
    x = torch.randn(BATCH, 4, size, size)
    return {"hidden_states": x, "timestep": torch.full((BATCH,), 500), "class_labels": torch.arange(BATCH)}


def flux_inputs(side: int) -> dict[str, Tensor]:
    """Build the inputs of a Flux for one image of side x side tokens of 64 elements, with 32 text tokens."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.cat([torch.zeros(side * side, 1), places], dim=1),
        "txt_ids": torch.zeros(32, 3),
    }


def calling(model: nn.Module, inputs: Mapping[str, Any]) -> Side:
    """Call a model without gradients."""

    @torch.no_grad()
    def call() -> Any:
        return model(**inputs)

    model.eval()
    return lambda: call


def training(model: nn.Module, inputs: Mapping[str, Any], losses: Callable[[Any], Mapping[str, Tensor]]) -> Side:
    """Compute the gradients of a training step.

    Args:
        model: set to training mode.
        inputs: of a call.
        losses: reads the auxiliary losses after a call, given its output.
    """

    def step() -> None:
        model.zero_grad()
        out = model(**inputs)
        loss = out.sample.square().mean()
        for value in losses(out).values():
            loss = loss + value
        loss.backward()

    model.train()
    return lambda: step


def stepping(library: Any, model: nn.Module, inputs: Mapping[str, Any], told: bool = False, steps: int = 400) -> Side:
    """Make the steps of a trajectory, of which only the first is computed.

    Args:
        library: the tokdyn that the model is wrapped with.
        model: wrapped with a FeatureCache.
        inputs: of the first call; its noise level falls to a tenth.
        told: whether the loop says which step it is at, as a wrapped pipeline does, where the library can be told.
        steps: of a trajectory; another begins where it ends.
    """
    state: dict[str, Any] = {"step": 0, "x": inputs["hidden_states"]}
    factors = torch.linspace(1.0, 0.1, steps)
    levels = [(inputs["timestep"] * factor).to(inputs["timestep"].dtype) for factor in factors]
    context = ExitStack()

    @torch.no_grad()
    def prepare() -> Callable[[], Any]:
        if state["step"] in (0, steps):
            context.close()
            library.reset(model)
            if told and hasattr(library, "trajectory"):
                state["here"] = context.enter_context(library.trajectory(model))
                state["here"].step = 0
            state["step"], state["x"] = 1, inputs["hidden_states"]
            model(**{**inputs, "timestep": levels[0]})
        state["x"] = 0.999 * state["x"] + 0.001 * torch.randn_like(state["x"])
        arguments = {**inputs, "hidden_states": state["x"], "timestep": levels[state["step"]]}
        if "here" in state:
            state["here"].step = state["step"]
        state["step"] += 1

        @torch.no_grad()
        def step() -> Any:
            return model(**arguments)

        return step

    model.eval()
    return prepare


def rows(older: Any) -> list[Row]:
    """List all comparisons."""

    def library(old: bool) -> Any:
        return older if old else tokdyn

    def seeded(build: Callable[[], Any]) -> Any:
        torch.manual_seed(0)
        return build()

    def bare_or_empty(build: Callable[[], nn.Module], run: Callable[[nn.Module], Side], old: bool) -> Side:
        model = seeded(build)
        return run(model if old else tokdyn.wrap(model, []))

    def wrapped(methods: Callable[[Any], list[Any]], old: bool, build: Callable[[], nn.Module] = dit) -> nn.Module:
        model: nn.Module = library(old).wrap(seeded(build), methods(library(old)))
        return model

    def dcdit(old: bool) -> nn.Module:
        model: nn.Module = seeded(
            lambda: library(old).DCDiT(sample_size=32, in_channels=4, hidden_size=192, depth=6, num_heads=6)
        )
        return model

    def cached(
        threshold: float | None, told: bool, build: Callable[[], nn.Module], inputs: Mapping[str, Any], old: bool
    ) -> Side:
        settings: dict[str, Any] = {"steps": (0,)} if threshold is None else {"threshold": threshold}
        model = wrapped(lambda lib: [lib.FeatureCache(**settings)], old, build)
        return stepping(library(old), model, inputs, told)

    x, packed = seeded(dit_inputs), seeded(lambda: flux_inputs(16))
    wide, long = seeded(lambda: dit_inputs(64)), seeded(lambda: flux_inputs(64))

    sampled: dict[str, Callable[[Any], list[Any]]] = {
        "TokenMerge": lambda lib: [lib.TokenMerge(ratio=0.5)],
        "DepthSkip": lambda lib: [lib.DepthSkip(blocks=(3, 8))],
        "DepthSkip at some levels": lambda lib: [lib.DepthSkip(blocks=(3, 8), levels=(0.4, 1.0))],
        "Chunking": lambda lib: [lib.Chunking(target=4)],
        "DynamicWidth": lambda lib: [lib.DynamicWidth(target=0.7)],
        "FeatureCache, computed step": lambda lib: [lib.FeatureCache(threshold=0.0)],
        "FeatureCache, TokenMerge and DepthSkip": lambda lib: [
            lib.FeatureCache(threshold=0.0), lib.TokenMerge(ratio=0.5), lib.DepthSkip(blocks=(3,))
        ],
    }  # fmt: skip
    trained = {
        "Chunking": sampled["Chunking"],
        "DynamicWidth": sampled["DynamicWidth"],
        "TokenDrop": lambda lib: [lib.TokenDrop(rate=0.5)],
    }

    def nothing(_: Any) -> dict[str, Tensor]:
        return {}

    def train(methods: Callable[[Any], list[Any]], old: bool) -> Side:
        model = wrapped(methods, old)
        return training(model, x, lambda _: library(old).losses(model))

    empty = LIMITS["empty"]
    listed = [
        Row(f"empty wrap: {name}", partial(bare_or_empty, build, run), empty)
        for name, build, run in (
            ("call, DiT", dit, lambda model: calling(model, x)),
            ("call, Flux", flux, lambda model: calling(model, packed)),
            ("training step, DiT", dit, lambda model: training(model, x, nothing)),
        )
    ]
    listed += [
        Row(f"call: {name}", partial(lambda methods, old: calling(wrapped(methods, old), x), methods))
        for name, methods in sampled.items()
    ]
    for name, build, inputs in (
        ("DiT, 4,096 elements", dit, x),
        ("DiT, 16,384 elements", partial(dit, 64), wide),
        ("Flux, 262,144 elements", flux, long),
    ):
        for kind, threshold, told in (
            ("steps that are set", None, False),
            ("steps that are set, told", None, True),
            ("by threshold", 1e9, False),
            ("by threshold, told", 1e9, True),
        ):
            side = partial(cached, threshold, told, build, inputs)
            listed.append(Row(f"cached step: {kind}, {name}", side, share=4.0))
    listed += [Row(f"training step: {name}", partial(train, methods), share=0.5) for name, methods in trained.items()]
    listed += [
        Row("DC-DiT: call", lambda old: calling(dcdit(old), x)),
        Row("DC-DiT: training step", lambda old: training(dcdit(old), x, lambda out: out.routing.losses), share=0.5),
    ]
    return listed


def compare(row: Row, rounds: int, clock: str) -> dict[str, Any]:
    """Time both sides of a row in turn, the order changing every round."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    each = max(3, math.ceil(rounds * row.share / BUILDS))
    rounds = BUILDS * each
    times: dict[bool, list[float]] = {True: [], False: []}
    for build in range(BUILDS):
        sides = {old: row.build(old) for old in ((True, False) if build % 2 else (False, True))}
        gc.collect()
        gc.disable()
        try:
            for index in range(-3, each):
                for old in (True, False) if index % 2 else (False, True):
                    call = sides[old]()
                    start = now()
                    call()
                    if index >= 0:
                        times[old].append((now() - start) * 1e3)
        finally:
            gc.enable()
    ratios = sorted(new / old for new, old in zip(times[False], times[True], strict=True))
    beside = math.ceil(0.98 * math.sqrt(rounds))  # 1.96 standard deviations of a binomial of 1/2
    middle = rounds // 2
    return {
        "name": row.name,
        "limit": row.limit,
        "ratio": statistics.median(ratios),
        "range": [ratios[max(0, middle - beside)], ratios[min(rounds - 1, middle + beside)]],
        "ratio_of_minima": min(times[False]) / min(times[True]),
        "median_ms": {"before": statistics.median(times[True]), "now": statistics.median(times[False])},
        "min_ms": {"before": min(times[True]), "now": min(times[False])},
        "rounds": rounds,
        "clock": clock,
        "machine": timing.machine(),
    }


def options() -> argparse.Namespace:
    """Read the command line."""
    made = command_line.parser(__doc__, rounds=60)
    made.add_argument("--against", required=True, help="revision of this repository, or folder of an older tokdyn")
    made.add_argument("--only", default="", help="measure the rows whose name contains this")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="time, or processor time of all threads")
    return made.parse_args()


def main() -> int:
    """Measure, print, and save on request."""
    given = command_line.start(options())
    with tempfile.TemporaryDirectory() as folder:
        try:
            older = load_older(given.against, Path(folder))
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        chosen = [row for row in rows(older) if given.only in row.name]
        found = [compare(row, given.rounds, given.clock) for row in chosen]
    table = Table("row", "before (ms)", "now (ms)", "ratio", "range", "of minima", "limit")
    for each in found:
        ms, (low, high) = each["median_ms"], each["range"]
        numbers = (f"{each['ratio']:.3f}", f"{low:.3f} to {high:.3f}", f"{each['ratio_of_minima']:.3f}")
        table.add_row(each["name"], f"{ms['before']:.2f}", f"{ms['now']:.2f}", *numbers, f"{each['limit']:.2f}")
    Console(width=140).print(table)
    if given.out:
        save(given.out, given.against, found)
    return command_line.finish(
        [
            f"{each['name']}: {each['ratio']:.3f} of {each['limit']}"
            for each in found
            if each["range"][0] > each["limit"]
        ]
    )


def save(path: Path, against: str, found: list[dict[str, Any]]) -> None:
    """Write the rows, in the place of rows with their names that are there."""
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    names = {each["name"]: each for each in [*known, *found]}
    timing.write(path, {"against": against, "rows": list(names.values())})


if __name__ == "__main__":
    sys.exit(main())
