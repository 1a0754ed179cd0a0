"""Wrap diffusers pipelines: every denoiser in them, and a trajectory that is told and not guessed.

The functions here take a model or a pipeline. `tokdyn.wrap`, `tokdyn.stats` and the others are these. They are loaded
when they are first used, so that names of pipelines can be checked before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.pipelines.calls import recording
    from tokdyn.pipelines.controls import (
        agree,
        beside_dense,
        disabled,
        is_wrapped,
        keeping,
        load,
        reset,
        save,
        set_tail_drop,
        stats,
        unwrap,
        wrap,
    )
    from tokdyn.pipelines.counting import flops
    from tokdyn.pipelines.denoisers import denoisers, is_pipeline

__all__ = [
    "agree",
    "beside_dense",
    "denoisers",
    "disabled",
    "flops",
    "is_pipeline",
    "is_wrapped",
    "keeping",
    "load",
    "recording",
    "reset",
    "save",
    "set_tail_drop",
    "stats",
    "unwrap",
    "wrap",
]

_OF_CONTROLS = {"agree", "beside_dense", "disabled", "is_wrapped", "keeping", "load", "reset", "save"}
_OF_CONTROLS |= {"set_tail_drop", "stats", "unwrap", "wrap"}

__getattr__ = loading(
    __name__,
    {
        **dict.fromkeys(_OF_CONTROLS, ".controls"),
        "denoisers": ".denoisers",
        "flops": ".counting",
        "is_pipeline": ".denoisers",
        "recording": ".calls",
    },
)
