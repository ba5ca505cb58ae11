"""order: rules read off the order of a short list, and the sums over a whole row that some of them ask for."""
