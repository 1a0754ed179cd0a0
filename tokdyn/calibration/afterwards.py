"""Methods that are put on a model when its training is over: calibrated where there is something to calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokdyn.attach.entry import attachment_of, unwrap, wrap
from tokdyn.attach.sidecar import save
from tokdyn.calibration.config import CalibrateConfig
from tokdyn.errors import InputError, TokdynError
from tokdyn.methods import Method, TokenMerge
from tokdyn.sample.loading import load_model
from tokdyn.upcycling.settings import AfterSettings


def finish(folder: Path, after: Sequence[AfterSettings]) -> Path:
    """Attach what a recipe asks for when its run is over; of several processes the first does it for all.

    Args:
        folder: of the run.
        after: see `attach_after`.

    Returns:
        The folder with the methods.
    """
    from accelerate import PartialState

    state, out = PartialState(), folder / "methods"
    if state.is_main_process:
        attach_after(folder, after, out)
    state.wait_for_everyone()
    return out


def attach_after(model: str | Path, after: Sequence[AfterSettings], out: Path) -> Path:
    """Calibrate methods on a trained model and write them together with those that it was trained with.

    Args:
        model: what `tokdyn sample` takes.
        after: the methods, each at most once.
        out: folder for the methods, which `tokdyn sample methods=` and `tokdyn.load` take; each calibration leaves its
            report and picture in a folder below.

    Returns:
        The folder.

    Raises:
        TokdynError: a method does not fit the model or another method.
    """
    from tokdyn.calibration.command import run

    names = [each.method for each in after]
    if len(set(names)) < len(names):
        raise InputError(f"the methods to attach are {', '.join(names)}; name each once.")
    made: list[Method] = []
    for each in after:
        if each.method == "merge":
            made.append(TokenMerge(ratio=each.ratio))
            continue
        settings: dict[str, Any] = {"flops": each.flops} if each.flops is not None else {}
        shared = {"steps": each.steps, "guidance": each.guidance, "count": each.count}
        given = {"model": str(model), "method": each.method, "out": out / each.method, **shared, **settings}
        config = CalibrateConfig.model_validate(given)
        made.append(run(config).method)
    whole, *_ = load_model(model)
    rewrap(whole, made)
    return save(whole, out)


def rewrap(model: nn.Module, more: Sequence[Method]) -> None:
    """Put methods around those that a model carries, whose trained parts stay as they are."""
    carried = attachment_of(model)
    if carried is None:
        wrap(model, more)
        return
    unwrap(model)
    try:
        wrap(model, [*more, *carried.methods])
        added = len(more)
    except TokdynError:
        wrap(model, carried.methods)
        added = 0
        raise
    finally:
        now = attachment_of(model)
        assert now is not None
        for place, part in carried.parts.items():
            now.parts[str(int(place) + added)].load_state_dict(part.state_dict())
