"""Upcycling: a DC-DiT from a pretrained DiT."""
