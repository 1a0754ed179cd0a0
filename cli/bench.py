"""`tokdyn bench flops | speed | quality`: one file per command."""

from __future__ import annotations

from . import bench_flops, bench_quality, bench_speed
from .frame import group

app = group("bench", "What models and stacks of methods cost, how fast they are and what they do to the images.")
for part in (bench_flops, bench_speed, bench_quality):
    part.register(app)
