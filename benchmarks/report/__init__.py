"""report: tables and plots of the result rows; python -m benchmarks.report --help."""
