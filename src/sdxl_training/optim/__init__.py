"""What turns gradients into weights: optimizers, schedules, loss scaling, clipping, weight averages."""
