"""experiments: from a question about decoding to a table and a plot with confidence intervals."""
