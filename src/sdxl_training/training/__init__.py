"""The training loop: one step, the trainer around it, checkpoints, previews."""
