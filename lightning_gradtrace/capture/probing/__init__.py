"""Running a model again on the batch and on the batch permuted, and leaving no trace of it."""
