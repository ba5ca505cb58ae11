"""wide: kernels for rows of which more tokens matter than the second launch lists, by many programs a row."""
