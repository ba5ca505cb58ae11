"""kernels: kernels against others; python -m benchmarks.kernels --help."""
