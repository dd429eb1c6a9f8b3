"""Parts of the batch: whose the entries of a tensor are, from function to function."""
