"""Blocks computed for some attention heads and MLP channels alone, on sliced weights."""
