"""What a pipeline and its training cost: counted, and timed."""
