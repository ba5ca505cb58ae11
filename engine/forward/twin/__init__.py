"""twin: the module tree that an engine runs beside the user's, what is swapped in it, and what it has to follow."""
