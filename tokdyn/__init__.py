"""Diffusion transformers that compute fewer tokens, blocks or channels: methods, wrappers for any DiT, and DC-DiT.

`tokdyn.wrap(model, methods)` attaches methods to a model. `import tokdyn` is cheap: it loads neither torch nor a
subpackage, and every public name is loaded when it is first used. docs/design.md lists the subpackages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tokdyn.errors import (
    CheckpointError,
    CompositionError,
    DataError,
    InputError,
    OutputError,
    RecipeError,
    TokdynError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from tokdyn.adapters import register_adapter
    from tokdyn.attach import (
        calibrate_router,
        dropping,
        losses,
        parts,
        traces,
        trajectory,
    )
    from tokdyn.bench.compare import compare
    from tokdyn.calibration import calibrate
    from tokdyn.methods import Chunking, DepthSkip, DynamicWidth, FeatureCache, TokenDrop, TokenMerge, register_method
    from tokdyn.models import DCDiT, DiT
    from tokdyn.pipelines import (
        agree,
        beside_dense,
        disabled,
        flops,
        keeping,
        load,
        recording,
        reset,
        save,
        set_tail_drop,
        stats,
        unwrap,
        wrap,
    )
    from tokdyn.presets import preset
    from tokdyn.upcycling import upcycle

__version__ = "0.1.0.dev0"

__all__ = [
    "CheckpointError",
    "Chunking",
    "CompositionError",
    "DCDiT",
    "DataError",
    "DepthSkip",
    "DiT",
    "DynamicWidth",
    "FeatureCache",
    "InputError",
    "OutputError",
    "RecipeError",
    "TokdynError",
    "TokenDrop",
    "TokenMerge",
    "UnsupportedModelError",
    "__version__",
    "agree",
    "beside_dense",
    "calibrate",
    "calibrate_router",
    "compare",
    "disabled",
    "dropping",
    "flops",
    "keeping",
    "load",
    "losses",
    "parts",
    "preset",
    "recording",
    "register_adapter",
    "register_method",
    "reset",
    "save",
    "set_tail_drop",
    "stats",
    "traces",
    "trajectory",
    "unwrap",
    "upcycle",
    "wrap",
]

_LAZY = {
    "register_adapter": "tokdyn.adapters",
    **dict.fromkeys(
        (
            "calibrate_router",
            "dropping",
            "losses",
            "parts",
            "traces",
            "trajectory",
        ),
        "tokdyn.attach",
    ),
    **dict.fromkeys(
        (
            "agree",
            "beside_dense",
            "disabled",
            "flops",
            "keeping",
            "load",
            "recording",
            "reset",
            "save",
            "set_tail_drop",
            "stats",
            "unwrap",
            "wrap",
        ),
        "tokdyn.pipelines",
    ),
    "preset": "tokdyn.presets",
    "upcycle": "tokdyn.upcycling",
    **dict.fromkeys(
        ("Chunking", "DepthSkip", "DynamicWidth", "FeatureCache", "TokenDrop", "TokenMerge", "register_method"),
        "tokdyn.methods",
    ),
    "calibrate": "tokdyn.calibration",
    "compare": "tokdyn.bench.compare",
    "DCDiT": "tokdyn.models",
    "DiT": "tokdyn.models",
    "ModelMixin": "diffusers",  # diffusers' pipelines look it up in the module of a custom class to know how to load it
}
_SUBMODULES = frozenset(
    {
        "adapters",
        "attach",
        "bases",
        "calibration",
        "checkpoints",
        "cost",
        "data",
        "demo",
        "diffusion",
        "evaluate",
        "methods",
        "models",
        "ops",
        "pipelines",
        "presets",
        "recipe",
        "report",
    }
    | {"sample", "scaling", "team", "testing", "tokens", "trace", "train", "upcycling"}
)


def __getattr__(name: str) -> object:
    """Load a public name or a subpackage on first use (PEP 562)."""
    if name in _LAZY:
        value: object = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List every public name and subpackage, loaded or not."""
    return sorted({*globals(), *__all__, *_SUBMODULES})
