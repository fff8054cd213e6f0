"""What runs on the shipped pair: the demo, and a look at its images."""
