"""Wrap diffusers pipelines: every denoiser in them, and a trajectory that is told and not guessed.

The functions here take a model or a pipeline. `tokdyn.wrap`, `tokdyn.stats` and the others are these.
"""

from tokdyn.pipelines.controls import beside_dense, disabled, load, reset, save, set_tail_drop, stats, unwrap, wrap
from tokdyn.pipelines.denoisers import denoisers

__all__ = ["beside_dense", "denoisers", "disabled", "load", "reset", "save", "set_tail_drop", "stats", "unwrap", "wrap"]
