"""compile: every Triton kernel compiled offline and held to limits; python -m benchmarks.compile --help."""
