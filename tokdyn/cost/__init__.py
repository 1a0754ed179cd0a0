"""FLOPs of the models: analytic, counted on the path that ran, per image and per training step.

One FLOP is one multiplication or one addition, so a multiply-add is 2 FLOPs everywhere in this package. (The DiT
papers print multiply-adds and call them GFLOPs: their numbers are half of these.) Counted are matrix products,
convolutions and the two products of attention. Left out are norms, activations, softmax, modulation, index
operations and the weighted sums of de-chunking, which are a few percent and no matrix products.
"""

from tokdyn.cost.analytic import compute_matched_steps, flops_per_image, kept_tokens, model_parts
from tokdyn.cost.counter import count
from tokdyn.cost.forward_pass import Flops, flops
from tokdyn.cost.statistics import CallStats, RunStats, StepStats, stats

__all__ = [
    "CallStats",
    "Flops",
    "RunStats",
    "StepStats",
    "compute_matched_steps",
    "count",
    "flops",
    "flops_per_image",
    "kept_tokens",
    "model_parts",
    "stats",
]
