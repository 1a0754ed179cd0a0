"""Compute and count the FLOPs of models: per call, per image, per training step and per trajectory.

One FLOP is one multiplication or one addition, so a multiply-add is 2 FLOPs everywhere in this package. (The DiT papers
print multiply-adds and call them GFLOPs, so their numbers are half of these.) Matrix products, convolutions, the two
products of attention and Fourier transforms are included, the last with the usual `2.5 n log2 n` for n real values.
Norms, activations, softmax, modulation, index operations and the weighted sums of de-chunking are left out: they are
not matrix products, and a few percent of the whole.
"""

from tokdyn.cost.analytic import compute_matched_steps, flops_per_image, kept_tokens, model_parts
from tokdyn.cost.counter import count
from tokdyn.cost.forward_pass import Flops, flops
from tokdyn.cost.statistics import stats
from tokdyn.cost.trajectory_stats import CallStats, StepStats, TrajectoryStats

__all__ = [
    "CallStats",
    "Flops",
    "StepStats",
    "TrajectoryStats",
    "compute_matched_steps",
    "count",
    "flops",
    "flops_per_image",
    "kept_tokens",
    "model_parts",
    "stats",
]
