"""gpu: everything that needs a GPU, in one command; python -m benchmarks.gpu --help."""
