"""What each CPU form gains: calls and training steps with one form turned off, against all of them on.

    python -m benchmarks.cpu_forms --list
    python -m benchmarks.cpu_forms --only DC-DiT-S --threads 2 --out benchmarks/results/cpu-forms.json

Each form, and each part of one that could go by itself, is replaced by the plain function while the other forms stay.
"gain" is how much longer the call takes then. All sides run in turn in one process, each on samples of its own length
in every round, as a router makes them. "nothing" turns nothing off: its gain is the noise. A form is measured in the
calls that reach it. With `--out`, results are added to those in the file, so that a measurement can be made in pieces;
the table shows the best call of each form.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokdyn
from benchmarks import command_line
from benchmarks.dcdit import precision, sampling
from tokdyn import Chunking, DCDiT, DiT, DynamicWidth, TokenDrop, TokenMerge
from tokdyn.bench import timing
from tokdyn.ops import attention, dispatch, layers
from tokdyn.ops.cpu import attention as cpu_attention
from tokdyn.ops.cpu import linear
from tokdyn.ops.dechunk import smooth

NOTHING = "nothing"
Off = Callable[[Any], Any]


@dataclass(frozen=True)
class Switch:
    """One function that a form consists of, and what takes its place when the form is off.

    Attributes:
        owner: a module, or the table of registered forms.
        key: name of the function in it.
        off: makes the replacement from the function.
    """

    owner: Any
    key: Any
    off: Off

    @contextmanager
    def replaced(self, make: Off) -> Iterator[None]:
        """Put what `make` makes of the function in its place."""
        table = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        function = table[self.key]
        table[self.key] = make(function)
        try:
            yield
        finally:
            table[self.key] = function


def form(function: Callable[..., Any]) -> Switch:
    """Switch a registered form off."""
    return Switch(dispatch._forms, function, lambda _: lambda *args, **kwargs: None)


def part(owner: Any, name: str, replacement: Any) -> Switch:
    """Replace a function of a module."""
    return Switch(owner, name, lambda _: replacement)


def _gelu_apart(linear_form: Any) -> Any:
    def off(x: Tensor, layer: nn.Module, gelu: bool = False) -> Tensor | None:
        out: Tensor | None = linear_form(x, layer)
        return F.gelu(out, approximate="tanh") if gelu and out is not None else out

    return off


def _cast_by_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype or layers.kept_casts() is None:
        return weight.to(dtype)
    key = id(weight), dtype
    if key not in _BY_ROWS:
        _BY_ROWS[key] = weight, weight.to(dtype)
    return _BY_ROWS[key][1]


_BY_ROWS: layers.Casts = {}
FORMS: dict[str, Switch] = {
    "linear": form(layers.linear),
    "linear: few numbers of rows": part(linear, "_with_room", lambda rows, dtype: rows.to(dtype).contiguous()),
    "linear: GELU in the product": Switch(dispatch._forms, layers.linear, _gelu_apart),
    "linear: weights cast once": part(layers, "kept_casts", lambda: None),
    "linear: casts column by column": part(linear, "_cast", _cast_by_rows),
    "modulated norm": form(layers.modulated_norm),
    "GroupNorm of small maps": form(layers.group_norm_silu),
    "dense attention": form(attention.dense_attention),
    "packed attention": form(attention.packed_attention),
    "packed attention: padding": part(cpu_attention, "choose", lambda *_: "split"),
    "packed attention: in place": part(cpu_attention, "_has_kernels", lambda: False),
    "smoothing": form(smooth),
}


@contextmanager
def off(name: str) -> Iterator[None]:
    """Turn a form off within this context."""
    with FORMS[name].replaced(FORMS[name].off) if name in FORMS else nullcontext():
        yield


def reached(name: str, call: Callable[[], Any]) -> bool:
    """Whether a call runs a form."""
    seen = []

    def noting(function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            if out is not None:
                seen.append(name)
            return out

        return noted

    with FORMS[name].replaced(noting):
        call()
    return bool(seen)


@dataclass(frozen=True)
class Setting:
    """A call or training step to measure.

    Attributes:
        name: says model, methods and shape.
        build: makes the model.
        inputs: shape of the input.
        kinds: "fp32" and "bf16" (autocast), each as "call" or "step".
        spread: of the share of tokens that a plan keeps of a sample, around `kept`; None lets the model decide.
        kept: mean share of the tokens that a plan keeps.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    kinds: tuple[str, ...]
    spread: float | None = None
    kept: float = 0.25


def dc(**settings: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a DC-DiT."""
    return partial(DCDiT, **settings)


def dit(**settings: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a DiT on patches of 2x2."""
    return partial(DiT, sample_size=32, patch_size=2, **settings)


def of_diffusers() -> nn.Module:
    """Build DiT-S/2 in diffusers."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, num_layers=12, sample_size=32, patch_size=2,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    )  # fmt: skip


def wrapped(build: Callable[[], nn.Module], *methods: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a model with methods."""
    return lambda: tokdyn.wrap(build(), list(methods))


DEMO = {"sample_size": 32, "in_channels": 3, "num_classes": 10, "patch_size": 2, "target": 4, "hidden_size": 128,
        "depth": 4, "num_heads": 4}  # fmt: skip
README = {"sample_size": 32, "in_channels": 3, "num_classes": 10, "hidden_size": 64, "depth": 2, "num_heads": 2}
CIFAR = {"sample_size": 32, "in_channels": 3, "num_classes": 10, "patch_size": 2, "hidden_size": 192, "depth": 6,
         "num_heads": 6, "target": 4}  # fmt: skip
SMALL = {"hidden_size": 384, "depth": 12, "num_heads": 6}
CALLS = ("fp32 call", "bf16 call")
STEPS = ("fp32 step", "bf16 step")


SETTINGS = (
    Setting("README DC-DiT tiny, 4 x 1024", dc(**README), (4, 3, 32, 32), ("fp32 call",), 0.3),
    Setting("demo DC-DiT, 8 x 256", dc(**DEMO), (8, 3, 32, 32), ("fp32 call", "fp32 step", "bf16 step"), 0.3),
    Setting("CIFAR-10 DC-DiT, 16 x 256", dc(**CIFAR), (16, 3, 32, 32), ("bf16 call", "bf16 step"), 0.3),
    Setting("DC-DiT-S, 2 x 1024", dc(**SMALL), (2, 4, 32, 32), (*CALLS, *STEPS), 0.05),
    Setting("DC-DiT-S guided, 4 x 1024", dc(**SMALL), (4, 4, 32, 32), (*CALLS, "bf16 step"), 0.6),
    Setting("DC-DiT-S, 1 x 4096", dc(**SMALL, sample_size=64), (1, 4, 64, 64), CALLS, 0.05),
    Setting("DiT-S/2, 4 x 256", dit(**SMALL), (4, 4, 32, 32), (*CALLS, *STEPS)),
    Setting("DiT-S/2 + Chunking, 4 x 256", wrapped(dit(**SMALL), Chunking(target=4)), (4, 4, 32, 32),
            (*CALLS, "bf16 step")),
    Setting("DiT-S/2 + TokenMerge, 4 x 256", wrapped(dit(**SMALL), TokenMerge(ratio=0.5)), (4, 4, 32, 32), CALLS),
    Setting("DiT-S/2 + TokenDrop, 4 x 256", wrapped(dit(**SMALL), TokenDrop()), (4, 4, 32, 32), ("bf16 step",)),
    Setting("DiT-S/2 + DynamicWidth, 4 x 256", wrapped(dit(**SMALL), DynamicWidth()), (4, 4, 32, 32), ("bf16 call",)),
    Setting("diffusers DiT-S/2 + Chunking, 4 x 256", wrapped(of_diffusers, Chunking(target=4)), (4, 4, 32, 32),
            (*CALLS, "fp32 step")),
)  # fmt: skip


def plans(batch: int, count: int, kept: float, spread: float, seed: int) -> Iterator[Tensor]:
    """Yield plans (B, N) whose samples keep other numbers of tokens in every call, as a router makes them."""
    drawn = torch.Generator().manual_seed(seed)
    shares = 1 + spread * torch.linspace(-1, 1, batch) if batch > 1 else torch.ones(1)  # the same sum in every call
    while True:
        lengths = (kept * count * shares[torch.randperm(batch, generator=drawn)]).round()
        lengths += torch.randint(-2 * batch, 2 * batch + 1, (batch,), generator=drawn) / 4
        order = torch.rand(batch, count, generator=drawn).argsort(dim=1).argsort(dim=1)
        yield order < lengths[:, None]


def calls(setting: Setting, kind: str) -> Callable[[int], Callable[[], None]]:
    """Build the model; return a function that makes a side: the call, on plans of its own."""
    torch.manual_seed(0)
    model, learning = setting.build(), kind.endswith("step")
    model.train(learning)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, which no kernel should profit from
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    batch = setting.inputs[0]
    x, steps = torch.randn(setting.inputs), torch.randint(1000, (batch,))
    labels = torch.randint(10, (batch,))
    if isinstance(model, DCDiT):
        count = (x.shape[2] // model.config.patch_size) * (x.shape[3] // model.config.patch_size)

    def side(seed: int) -> Callable[[], None]:
        drawn = None if setting.spread is None else plans(batch, count, setting.kept, setting.spread, seed)

        def call() -> None:
            more = {} if drawn is None else {"plan": next(drawn)}
            if not learning:
                model(x, timestep=steps, class_labels=labels, **more)
                return
            with precision(kind[:4]):
                out = model(x, timestep=steps, class_labels=labels, **more).sample
            out.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        return call

    return side


def measure(setting: Setting, kind: str, names: Iterable[str], given: Namespace) -> dict[str, Any]:
    """Time a setting with each of the named forms that it reaches turned off, and with none."""
    side = calls(setting, kind)
    with sampling(kind[:4]) if kind.endswith("call") else torch.enable_grad():
        used = [name for name in names if reached(name, side(0))]

        def without(name: str, call: Callable[[], None]) -> None:
            with off(name):
                call()

        sides = {name: partial(without, name, side(seed)) for seed, name in enumerate(("", NOTHING, *used), 1)}
        times = in_turn(sides, given)
    rounds = len(times[""])
    kinds = {"median": statistics.median, "quartile": lambda found: statistics.quantiles(found, n=4)[0]}
    on = {each: of(times[""] + times[NOTHING]) for each, of in kinds.items()}
    return {
        "setting": setting.name, "kind": kind, "threads": torch.get_num_threads(), "rounds": rounds,
        "clock": "processor" if given.processor else "wall", "ms": {each: 1e3 * value for each, value in on.items()},
        "gains": {
            name: {each: of(times[name]) / on[each] - 1 for each, of in kinds.items()} for name in (NOTHING, *used)
        },
    }  # fmt: skip


def in_turn(sides: Mapping[str, Callable[[], None]], given: Namespace) -> dict[str, list[float]]:
    """Run every side once per round, after two rounds that do not count; return the seconds of each."""
    clock = time.process_time if given.processor else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in sides}
    began = clock()
    gc.disable()
    for turn in range(-2, given.rounds):
        if turn == 0:
            began = clock()
        if turn > 4 and clock() - began > given.seconds:
            break
        order = list(sides)[turn % len(sides) :] + list(sides)[: turn % len(sides)]
        for name in order:
            start = clock()
            sides[name]()
            if turn >= 0:
                found[name].append(clock() - start)
    gc.enable()
    return found


def best(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, Mapping[str, Any]]]:
    """Find the call in which each form gains most, by the smaller of its gains in median and lower quartile."""
    found: dict[str, tuple[float, Mapping[str, Any]]] = {}
    for row in rows:
        for name, gain in row["gains"].items():
            least = min(gain["median"], gain["quartile"])
            if name not in found or least > found[name][0]:
                found[name] = least, row
    return found


def main() -> int:
    """Measure, print the best call of each form, and save on request."""
    parser = command_line.parser(__doc__, rounds=15)
    parser.add_argument("--only", default="", help="settings whose name and kind match this pattern")
    parser.add_argument("--forms", default="", help="forms whose name matches this pattern")
    parser.add_argument("--seconds", type=float, default=30.0, help="fewer rounds, 5 at least, where they take longer")
    parser.add_argument("--processor", action="store_true", help="processor time: for one thread, on a busy machine")
    parser.add_argument("--list", action="store_true", help="list settings and forms")
    given: Namespace = command_line.start(parser.parse_args())
    names = [name for name in FORMS if re.search(given.forms, name)]
    chosen = [
        (setting, kind)
        for setting in SETTINGS
        for kind in setting.kinds
        if re.search(given.only, f"{setting.name}, {kind}")
    ]
    if given.list:
        print("\n".join([*(f"{setting.name}, {kind}" for setting, kind in chosen), "", *names]))
        return 0
    done: list[dict[str, Any]] = []
    if given.out and Path(given.out).exists():
        done = json.loads(Path(given.out).read_text())["rows"]
    for setting, kind in chosen:
        row = measure(setting, kind, names, given)
        print(f"{setting.name}, {kind}: {row['ms']['median']:.1f} ms, {row['rounds']} rounds", flush=True)
        for name, gain in row["gains"].items():
            print(f"    {gain['median']:+7.1%} {gain['quartile']:+7.1%}  {name}", flush=True)
        same = ("setting", "kind", "threads", "clock")
        done = [each for each in done if any(each[key] != row[key] for key in same)] + [row]
        if given.out:
            timing.write(given.out, {"machine": timing.machine(), "rows": done})
    table = Table("form", "gain", "in", title="without the form, the call takes longer by")
    for name, (gain, row) in best(done).items():
        table.add_row(name, f"{gain:.0%}", f"{row['setting']}, {row['kind']}, {row['threads']} threads")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
