"""Demonstrate tokdyn (`tokdyn demo`): show what the shipped models do, or train a small DC-DiT and score its router.

The names are loaded when they are first used, so that settings can be checked before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.demo.router import RouterScore, score_router
    from tokdyn.demo.run import DemoResult, demo
    from tokdyn.demo.settings import DemoSettings
    from tokdyn.demo.shipped import Shown, ShownRow, show

__all__ = ["DemoResult", "DemoSettings", "RouterScore", "Shown", "ShownRow", "demo", "score_router", "show"]

__getattr__ = loading(
    __name__,
    {
        "DemoResult": ".run",
        "DemoSettings": ".settings",
        "RouterScore": ".router",
        "Shown": ".shipped",
        "ShownRow": ".shipped",
        "demo": ".run",
        "score_router": ".router",
        "show": ".shipped",
    },
)
