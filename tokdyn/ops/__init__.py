"""Pure tensor functions: no parameters, no configuration, no state."""

from tokdyn.ops.attention import attention_backend, dense_attention, packed_attention
from tokdyn.ops.dechunk import dechunk, dechunk_packed
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
    "ratio_loss",
    "select",
    "sincos_position",
    "straight_through",
    "tail_drop",
    "timestep_frequencies",
    "unpack",
]
