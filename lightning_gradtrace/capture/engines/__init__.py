"""Ways to per-sample gradients: the tape, a loss per sample, and single loss tokens."""
