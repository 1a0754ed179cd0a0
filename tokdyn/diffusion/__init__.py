"""Define the training objectives, and sample images with diffusers' schedulers."""
