"""Benchmarks behind the published numbers: one command each, with results as JSON."""
