"""linear: products with weights that are blocked or packed."""
