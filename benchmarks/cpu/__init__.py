"""cpu: decoding on a CPU; python -m benchmarks.cpu --help."""
