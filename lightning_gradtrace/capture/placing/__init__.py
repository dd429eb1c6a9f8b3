"""Where the samples are in the tensors of a use: sizes propose, the permutation probe confirms or chooses."""
