"""Training objectives, and sampling on diffusers' schedulers."""
