"""Measure what distillation adds to a training step: `python -m benchmarks.distillation --out results.json`.

The student is a DC-DiT upcycled from a DiT-S with patches of 4, on 32x32 inputs. There are two bars. A distilled step
takes no longer than a plain step and a forward of the base together, with a margin of 5% for noise. The memory kept for
the backward pass grows by no more than one output of every block, with a margin of 1% for scalars.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import tokdyn
from benchmarks import command_line
from tokdyn import DiT
from tokdyn.bench.timing import in_turn, machine, write
from tokdyn.diffusion.objective import Objective
from tokdyn.seeds import image_keys
from tokdyn.train.step import RatioTerm, draw, micro_step
from tokdyn.upcycling import Distillation
from tokdyn.upcycling.phases import PhaseBatch
from tokdyn.upcycling.settings import PhaseSettings

SLACK = 1.05


def step(model: Distillation, phase: PhaseSettings, batch: int) -> Callable[[], None]:
    """Return a function that runs a forward and a backward pass on random images, the same in every call."""
    torch.manual_seed(0)
    draws = draw(Objective(), torch.randn(batch, 4, 32, 32), torch.arange(batch), 1000, 0.1, image_keys(0, 0, 0, batch))
    phase_batch = PhaseBatch(phase, torch.ones(batch, dtype=torch.bool))

    def run() -> None:
        out = micro_step(model, Objective(), draws, "fp32", RatioTerm(4.0, 0.03, None), phase_batch)
        torch.autograd.backward(out.loss)
        for parameter in model.parameters():
            parameter.grad = None

    return run


def kept_bytes(run: Callable[[], None], weights: set[int]) -> int:
    """Return the bytes kept for the backward pass, without those of the weights at some addresses."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write JSON if asked; return 1 if a bar is missed."""
    parser = command_line.parser(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=16, help="samples of a training step")
    options = command_line.start(parser.parse_args(argv))
    torch.manual_seed(0)
    base = DiT.named("S/4", sample_size=32)
    student = tokdyn.upcycle(base, "dc", target=4)
    distillation = Distillation(student, base)
    x, labels = torch.randn(options.batch, 4, 32, 32), torch.arange(options.batch)
    times = torch.full((options.batch,), 500)

    @torch.inference_mode()
    def teacher() -> Any:
        return base(x, times, labels)

    plain = step(distillation, PhaseSettings(name="plain", plan="fixed"), options.batch)
    distilled = step(distillation, PhaseSettings(name="distilled", plan="fixed", teacher=1.0), options.batch)
    results = in_turn({"plain step": plain, "distilled step": distilled, "base": teacher}, options.rounds)
    ms = {name: result["median_ms"] for name, result in results.items()}
    weights = {tensor.data_ptr() for model in (base, student) for tensor in model.state_dict().values()}
    memory = {"plain": kept_bytes(plain, weights), "distilled": kept_bytes(distilled, weights)}
    tokens = options.batch * 64
    outputs = len(student.blocks) * tokens * student.config.hidden_size * 4
    result = {
        "machine": machine(),
        "batch": options.batch,
        "times": results,
        "over_plain_and_base": ms["distilled step"] / (ms["plain step"] + ms["base"]),
        "kept_bytes": memory,
        "block_outputs_bytes": outputs,
        "kept_more": (memory["distilled"] - memory["plain"]) / outputs,
    }
    steps = (
        f"{ms['plain step']:.0f} ms, with the base {ms['distilled step']:.0f} ms, the base alone {ms['base']:.0f} ms"
    )
    sizes = f"{memory['plain'] / 2**20:.0f} MiB, with the base {memory['distilled'] / 2**20:.0f} MiB"
    print(f"a step takes {steps}: {result['over_plain_and_base']:.3f} of the sum (bar {SLACK})")
    print(f"kept for the backward pass: {sizes}, {result['kept_more']:.2f} outputs of every block more (bar 1)")
    if options.out:
        write(options.out, result)
    slow = [f"the step, above {SLACK} of the sum"] * (result["over_plain_and_base"] > SLACK)
    return command_line.finish(slow + ["what is kept, above one output of every block"] * (result["kept_more"] > 1.01))


if __name__ == "__main__":
    sys.exit(main())
