"""Calibrate methods on recorded calls of a model: which blocks DepthSkip skips, and when FeatureCache reuses them.

The names are loaded when they are first used, so that `tokdyn calibrate --help` loads no model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.calibration.caching import CacheCalibration, calibrate_cache
    from tokdyn.calibration.dispatch import calibrate, calibrates
    from tokdyn.calibration.skipping import SkipCalibration, calibrate_skipping
    from tokdyn.pipelines import recording
    from tokdyn.recorder import Call

__all__ = [
    "CacheCalibration",
    "Call",
    "SkipCalibration",
    "calibrate",
    "calibrate_cache",
    "calibrate_skipping",
    "calibrates",
    "recording",
]

__getattr__ = loading(
    __name__,
    {
        "CacheCalibration": ".caching",
        "Call": "tokdyn.recorder",
        "SkipCalibration": ".skipping",
        "calibrate": ".dispatch",
        "calibrate_cache": ".caching",
        "calibrate_skipping": ".skipping",
        "calibrates": ".dispatch",
        "recording": "tokdyn.pipelines",
    },
)
