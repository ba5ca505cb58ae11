"""search: the most probable sequences, or those that hold what they must."""
