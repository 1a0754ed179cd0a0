"""What models and stacks of methods cost, how fast they are and what they do to the images."""
