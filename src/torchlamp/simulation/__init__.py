"""A site under a policy, simulated: low pass, look-ahead, recomputation, counted."""
