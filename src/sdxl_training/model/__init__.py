"""SDXL as one object: loading it, running its encoders, and writing it in the two formats other programs read."""
