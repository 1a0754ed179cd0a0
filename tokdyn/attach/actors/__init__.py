"""Methods at work: one file for each, which knows the method and the run but no model."""
