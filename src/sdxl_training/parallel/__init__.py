"""More than one process: the group, the wrapped model, sums over all ranks."""
