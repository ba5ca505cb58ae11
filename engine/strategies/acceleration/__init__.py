"""acceleration: several tokens a forward pass; the law stays, but where it is said."""
