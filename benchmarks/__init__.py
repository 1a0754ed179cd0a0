"""Measurements behind the published numbers: one command each, results as JSON."""
