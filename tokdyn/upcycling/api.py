"""upcycle: a model with fewer tokens, or less width, from a pretrained one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tokdyn.attach import attachment_of, wrap
from tokdyn.bases import open_base
from tokdyn.errors import InputError
from tokdyn.methods import Chunking, DynamicWidth, Method
from tokdyn.models import DCDiT, DiT
from tokdyn.upcycling.dc import to_dc

CALIBRATED = {
    "merge": "attach tokdyn.TokenMerge() with tokdyn.wrap",
    "skip": "call tokdyn.calibrate(model, calls, tokdyn.DepthSkip(), flops=...)",
    "cache": "call tokdyn.calibrate(model, calls, tokdyn.FeatureCache(), flops=...)",
}
"""Methods that are not trained into a model, and what to do instead."""


def check_method(name: Any) -> None:
    """Refuse what is not trained into a model.

    Raises:
        InputError: names the method and what to do.
    """
    if name in CALIBRATED:
        raise InputError(f"{name!r} is not trained into a model; {CALIBRATED[name]}.")
    if name not in ("dc", "dydit"):
        more = ", ".join(CALIBRATED)
        raise InputError(f"method {name!r} is unknown; known are dc and dydit, and {more} without training.")


def upcycle(base: nn.Module | str | Path, method: str | Sequence[str] = "dc", **settings: Any) -> Any:
    """Make the model that training goes on with from a pretrained one, which is left as it is.

    ``dc`` makes a `DCDiT` of a `DiT` (arXiv 2603.06351): blocks and embedders are copied, the embedders frozen;
    encoder, router, decoder and head are new. Of any other transformer that an adapter knows it makes a copy with a
    `Chunking` around its blocks, which computes what the model did until it drops tokens. ``dydit`` attaches a
    `DynamicWidth` (arXiv 2410.03456), whose gates start open.

    Args:
        base: a model, or what `tokdyn models` lists, the path of a checkpoint, or an id of the hub.
        method: "dc", "dydit", or both in one list.
        **settings: of the methods: target, patch_size, router, encoder_depth, ... of ``dc``; those that begin with
            ``width_`` are settings of `DynamicWidth`, as in width_target=0.7.

    Returns:
        The new model, in training mode. `tokdyn.upcycling.report(base, model)` says what was copied, new and frozen.

    Raises:
        InputError: an unknown method, or one that is not trained; settings that do not fit.
        UnsupportedModelError: no adapter knows the model.
    """
    names = list(method) if isinstance(method, list | tuple) else [method]
    for name in names:
        check_method(name)
    if not names or len(set(names)) < len(names):
        raise InputError(f"the methods are {names}; name at least one, each once.")
    model = base if isinstance(base, nn.Module) else open_base(base)
    if attachment_of(model) is not None:
        raise InputError(f"this {type(model).__name__} is wrapped; call tokdyn.unwrap on it first.")
    width = {key.removeprefix("width_"): value for key, value in settings.items() if key.startswith("width_")}
    other = {key: value for key, value in settings.items() if not key.startswith("width_")}
    if width and "dydit" not in names:
        raise InputError(f"width_{next(iter(width))} is a setting of dydit, which is not among the methods.")
    if other and "dc" not in names:
        raise InputError(f"{next(iter(other))} is a setting of dc, which is not among the methods.")
    attached: list[Method] = []
    if "dc" not in names:
        student: Any = copy.deepcopy(model)
    elif isinstance(model, DiT):
        student = to_dc(model, **other)
    elif isinstance(model, DCDiT):
        raise InputError("the base is a DC-DiT already; train it on, or attach methods with tokdyn.wrap.")
    else:
        student = copy.deepcopy(model)
        attached.append(Chunking(**other))
    if "dydit" in names:
        attached.append(DynamicWidth(**width))
    return wrap(student.train(), attached) if attached else student
