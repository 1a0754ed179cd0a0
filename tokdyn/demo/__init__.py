"""Demonstrate tokdyn (`tokdyn demo`): train a small DC-DiT on procedural shapes, sample it and score its router."""

from tokdyn.demo.router import RouterScore, score_router
from tokdyn.demo.run import DemoResult, DemoSettings, demo

__all__ = ["DemoResult", "DemoSettings", "RouterScore", "demo", "score_router"]
