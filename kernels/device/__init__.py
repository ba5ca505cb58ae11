"""device: the Triton side of the sampler; importing its files needs triton."""
