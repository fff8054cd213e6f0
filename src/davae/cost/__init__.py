"""The cost of a pipeline and of its training, counted and timed."""
