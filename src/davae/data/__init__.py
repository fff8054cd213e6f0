"""Pictures and captions: reading them safely, and the order in which training sees them."""
