"""What makes a model fit: precision of the computation, activation checkpointing."""
