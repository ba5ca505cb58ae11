"""continuous: what is fed is a mixture of words rather than one."""
