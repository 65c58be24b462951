"""From a folder of pictures to batches: scan, captions, buckets, latent cache, schedule, loader."""
