"""The training engine: the loop, its data, its checkpoints and its bill."""
