"""Measure models and stacks (lists of methods that act together): their cost, their speed and their image quality."""
