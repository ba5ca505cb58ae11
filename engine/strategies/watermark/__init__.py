"""watermark: marks in the choice of tokens, and the detectors that find them with exact p-values."""
