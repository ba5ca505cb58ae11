"""fused: decoder layers of a twin whose norms, rotations, gates and products run as a few launches of our kernels."""
