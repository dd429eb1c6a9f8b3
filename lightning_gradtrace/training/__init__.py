"""From the hooks of a training to the rows of a trace: batches, backward passes, optimizer steps."""
