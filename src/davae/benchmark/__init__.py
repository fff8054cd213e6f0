"""How long the parts of a pipeline take, and how near that is to what the machine can do."""
