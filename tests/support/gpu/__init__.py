"""What a GPU shows: exact gradients, times and waits, and a training, in one run of a few minutes."""
