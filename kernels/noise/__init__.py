"""noise: counter-based random words and Gumbel noise, the same bits everywhere."""
