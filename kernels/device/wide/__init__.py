"""Kernels for rows of which more tokens matter than the list of the second launch takes, by many programs a row."""
