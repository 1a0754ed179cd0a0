"""Wrap diffusers pipelines: every denoiser in them, and a trajectory that is told and not guessed.

The functions here take a model or a pipeline. `tokdyn.wrap`, `tokdyn.stats` and the others are these.
"""

from tokdyn.pipelines.calls import recording
from tokdyn.pipelines.controls import (
    agree,
    beside_dense,
    disabled,
    is_wrapped,
    keeping,
    reset,
    set_tail_drop,
    stats,
    unwrap,
    wrap,
)
from tokdyn.pipelines.counting import flops
from tokdyn.pipelines.denoisers import denoisers, is_pipeline
from tokdyn.pipelines.saving import load, save

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
