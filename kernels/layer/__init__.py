"""layer: what a decoder layer does between its products."""
