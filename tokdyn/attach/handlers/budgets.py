"""How many of the kept tokens each sample of a call drops."""

from __future__ import annotations

from tokdyn.attach.run import Run
from tokdyn.errors import InputError
from tokdyn.ops.schedules import Curve, at


def drops(run: Run, default: Curve) -> tuple[float, ...]:
    """Tail drop of every sample: what `tokdyn.set_tail_drop` set, else the method's own setting.

    Raises:
        InputError: the batch does not have the samples that a value was set for.
    """
    given = run.attachment.tail_drop
    if given is None:
        if isinstance(default, float):
            return (default,) * run.batch
        return tuple(at(default, level) for level in run.level)
    if not isinstance(given, dict):
        return run.per_sample(given, "tail_drop")
    if run.adapter.guidance == "calls":
        return (given["uncond" if run.turn.unconditional else "cond"],) * run.batch
    run.record.guided = True
    if run.batch % 2:
        raise InputError(
            f"tail_drop has a value for each guidance branch, but the batch holds {run.batch} samples, which are not "
            "two halves; call the model with both branches, or set one number."
        )
    half = run.batch // 2
    first, second = (given[name] for name in run.adapter.halves)
    return (first,) * half + (second,) * half
