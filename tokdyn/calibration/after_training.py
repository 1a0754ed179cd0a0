"""Attach methods to a model after its training, calibrated where they can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokdyn.adapters.clock import told_level
from tokdyn.attach import attachment_of, save, unwrap, wrap
from tokdyn.calibration.command import calibrate_from_disk
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.errors import InputError, TokdynError
from tokdyn.methods import Method, TokenMerge
from tokdyn.sample.loading import load_model
from tokdyn.upcycling.settings import AfterSettings


def finish(folder: Path, after: Sequence[AfterSettings]) -> Path:
    """Attach the methods of a recipe after its run; of several processes, the first does it for all.

    Args:
        folder: folder of the run.
        after: see `attach_after`.

    Returns:
        The folder of the methods.
    """
    from accelerate import PartialState

    state, out = PartialState(), folder / "methods"
    if state.is_main_process:
        attach_after(folder, after, out)
    state.wait_for_everyone()
    return out


def attach_after(model: str | Path, after: Sequence[AfterSettings], out: Path) -> Path:
    """Calibrate methods on a trained model, and save them together with those that it was trained with.

    Args:
        model: anything `tokdyn sample` accepts.
        after: the methods, each at most once.
        out: folder for the methods, for `tokdyn sample methods=` and `tokdyn.load`; each calibration also leaves its
            report and picture in a folder inside.

    Returns:
        The folder.

    Raises:
        TokdynError: a method does not fit the model or another method.
    """
    names = [each.method for each in after]
    if len(set(names)) < len(names):
        raise InputError(f"the methods to attach are {', '.join(names)}; name each of them once.")
    methods: list[Method] = []
    for each in after:
        if each.method == "merge":
            methods.append(TokenMerge(ratio=each.ratio))
            continue
        target: dict[str, Any] = {"flops": each.flops} if each.flops is not None else {}
        shared = {"steps": each.steps, "guidance": each.guidance, "count": each.count}
        settings = {"model": str(model), "method": each.method, "out": out / each.method, **shared, **target}
        methods += [found.method for found in calibrate_from_disk(CalibrateConfig.model_validate(settings)).values()]
    trained, *_ = load_model(model)
    rewrap(trained, methods)
    return save(trained, out)


def rewrap(model: nn.Module, more: Sequence[Method]) -> None:
    """Put methods around those that a model is wrapped with, whose trained parts keep their weights."""
    before = attachment_of(model)
    if before is None:
        wrap(model, more)
        return
    unwrap(model)
    level = told_level(before.adapter)
    try:
        wrap(model, [*more, *before.methods], level)
        added = len(more)
    except TokdynError:
        wrap(model, before.methods, level)
        added = 0
        raise
    finally:
        after = attachment_of(model)
        assert after is not None
        for place, part in before.parts.items():
            after.parts[str(int(place) + added)].load_state_dict(part.state_dict())
