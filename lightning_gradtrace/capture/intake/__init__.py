"""What arrives: a batch, what is in it, and who its samples are."""
