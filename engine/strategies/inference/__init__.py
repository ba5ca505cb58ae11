"""inference: sequences from a distribution that no step can draw from: weights, chains, tries and trees."""
