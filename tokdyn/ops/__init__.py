"""Pure tensor functions: no parameters, no configuration, no state.

Each function is its formula in plain PyTorch. Some have a faster form for the CPU in `tokdyn.ops.cpu`, which runs by
itself where that is safe; `plain()` and the environment variable `TOKDYN_PLAIN_OPS=1` turn all of those off.
"""

from tokdyn.ops import cpu as _cpu  # noqa: F401  registers the CPU forms
from tokdyn.ops.attention import attention_backend, dense_attention, packed_attention
from tokdyn.ops.dechunk import dechunk, dechunk_packed
from tokdyn.ops.dispatch import plain
from tokdyn.ops.nearest import nearest_kept
from tokdyn.ops.pack import pack, unpack
from tokdyn.ops.position import sincos_position, timestep_frequencies
from tokdyn.ops.precision import exact
from tokdyn.ops.routing import ratio_loss, select, straight_through, tail_drop

__all__ = [
    "attention_backend",
    "dechunk",
    "dechunk_packed",
    "dense_attention",
    "exact",
    "nearest_kept",
    "pack",
    "packed_attention",
    "plain",
    "ratio_loss",
    "select",
    "sincos_position",
    "straight_through",
    "tail_drop",
    "timestep_frequencies",
    "unpack",
]
