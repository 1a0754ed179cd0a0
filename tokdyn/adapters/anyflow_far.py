"""The adapter of AnyFlow FAR, whose frames attend to earlier ones by a mask, or by a cache of their keys and values.

The call that fills the cache is made without methods. In other calls all tokens must be there: attention pads their
number, and masks and caches count them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokdyn.adapters import modulation
from tokdyn.adapters.arrangement import Arrangement
from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter
from tokdyn.adapters.readers import frame_level
from tokdyn.adapters.video_wan import ANYFLOW
from tokdyn.lazy import Lazy
from tokdyn.tokens import ImageTokens

_CACHE = "kv_cache"


def _moved(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Swap the first two axes of the cached tensors, keys and values (2) and samples (B); the inverse of itself."""
    cache = named.get(_CACHE)
    if cache is None:
        return dict(named)
    return {**named, _CACHE: {name: value.transpose(0, 1) for name, value in cache.items()}}


def _fills_cache(call: Arguments) -> bool:
    flag = call.get("kv_cache_flag")
    return call.get(_CACHE) is not None and bool(flag and flag.get("is_cache_step"))


ANYFLOW_FAR = ModelAdapter(
    name="AnyFlow FAR",
    classes=("AnyFlowFARTransformer3DModel",),
    blocks=(
        Blocks(
            "blocks",
            arrangement=Arrangement(_moved, _moved),
            shared=("rotary_emb",),
            attention=(),
            mlp=("ffn",),
            modulated=modulation.shift_table_per_token,
            products=None,  # its attention is padded to squares of 128 x 128
        ),
    ),
    grid=ANYFLOW.grid,
    level=frame_level(),
    varying=("r_timestep", _CACHE, "kv_cache_flag"),
    plain=_fills_cache,
    complete="attention pads the number of tokens, and its masks and caches count them, so that none may be missing; "
    "use TokenMerge(where='mlp'), DepthSkip or FeatureCache",
)
