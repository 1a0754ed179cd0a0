"""The methods at work: one handler for each."""
