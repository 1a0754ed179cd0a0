"""Compute blocks for some attention heads and MLP channels only, on sliced weights; used by DynamicWidth."""
