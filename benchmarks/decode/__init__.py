"""decode: decoding against others; python -m benchmarks.decode --help."""
