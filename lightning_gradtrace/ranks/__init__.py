"""Several processes that record one training together: what they tell each other, and what only all of them know."""
