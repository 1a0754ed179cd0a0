"""Attaching methods to a model that was built without them."""
