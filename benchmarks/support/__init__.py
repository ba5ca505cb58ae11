"""support: what every benchmark shares."""
