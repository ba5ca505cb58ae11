"""inspector: what the page asks: the steps of a sample, and the passes of a strategy."""
