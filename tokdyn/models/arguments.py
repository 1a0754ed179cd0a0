"""The arguments that DiT and DC-DiT take, by name, so that settings can be checked before torch is loaded."""

from __future__ import annotations

from typing import Any, Literal

Size = int | tuple[int, int]

SHARED: dict[str, Any] = {
    "sample_size": Size,
    "patch_size": int,
    "in_channels": int,
    "hidden_size": int,
    "depth": int,
    "num_heads": int,
    "mlp_ratio": float,
    "num_classes": int,
    "learn_sigma": bool,
    "timestep_shift": int,
    "timestep_map": tuple[float, float],
    "mlp_norm_eps": float,
    "out_channels": int | None,
}
"""The types of the arguments of both constructors."""
OF_CHUNKING: dict[str, Any] = {
    "encoder_depth": int,
    "decoder_depth": int,
    "scaffold_width": int | None,
    "target": float,
    "router": Literal["spatial_predictability", "cosine", "random"],
    "sigma": float | None,
    "force_ends": bool,
    "official_init": bool,
    "position_scale": float,
    "condition_adaptor": bool,
}
"""Those of the DC-DiT alone."""
TARGET = 4.0
"""N, cells per kept token of a DC-DiT, where it is not given."""
ARGUMENTS = {"dit": SHARED, "dcdit": {**SHARED, **OF_CHUNKING}}
"""By the kind of the model."""
