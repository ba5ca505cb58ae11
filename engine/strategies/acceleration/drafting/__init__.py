"""drafting: where draft tokens come from: texts that were seen, the model itself, other models."""
