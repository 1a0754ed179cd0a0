"""What happened in a call of a wrapped model and along a trajectory, as plain data."""
