"""What the network is asked to learn: noise paths, prediction heads, level densities, loss weights, samplers."""
