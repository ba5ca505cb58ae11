"""pipeline: logits to logits, in the order that the user gives."""
