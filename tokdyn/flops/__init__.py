"""FLOPs of the models: analytic, counted on the path that ran, per image and per training step.

One FLOP is one multiplication or one addition, so a multiply-add is 2 FLOPs everywhere in this package. (The DiT
papers print multiply-adds and call them GFLOPs: their numbers are half of these.) Counted are matrix products,
convolutions and the two products of attention. Left out are norms, activations, softmax, modulation, index
operations and the weighted sums of de-chunking, which are a few percent and no matrix products.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from tokdyn.flops.analytic import flops_per_image, kept_tokens, model_parts
from tokdyn.flops.budget import compute_matched_steps
from tokdyn.flops.counted import Flops, flops
from tokdyn.flops.counting import count

__all__ = ["Flops", "compute_matched_steps", "count", "flops", "flops_per_image", "kept_tokens", "model_parts"]


class _Callable(ModuleType):
    """Lets `tokdyn.flops(model, x, ...)` work although `tokdyn.flops` is also the package that holds it."""

    def __call__(self, *inputs: Any, **keywords: Any) -> Flops:
        return flops(*inputs, **keywords)


sys.modules[__name__].__class__ = _Callable
