"""The tour behind `tokdyn demo`: train a small DC-DiT on procedural shapes, sample it at three budgets, and show it."""

from tokdyn.demo.router import RouterScore, score_router
from tokdyn.demo.tour import DemoResult, DemoSettings, demo

__all__ = ["DemoResult", "DemoSettings", "RouterScore", "demo", "score_router"]
