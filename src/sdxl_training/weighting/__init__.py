"""How much a picture counts by its tags: weights known before training, weights that follow it, and what is noted."""
