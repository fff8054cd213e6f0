"""Training: the state that survives a kill, and the two stages that use it."""
