"""What the loss is made of: labels, targets, mixup and CutMix. Needs JAX alone."""
