"""Weights of other programs: their checkpoints become folders that diffusers and davae read, key by key."""
