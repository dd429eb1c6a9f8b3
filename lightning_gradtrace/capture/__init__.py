"""Per-sample gradients of the real training step."""
