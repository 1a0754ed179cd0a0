"""Figures: image grids, boundary maps, and curves of cost and quality."""
