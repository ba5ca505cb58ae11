"""selection: several samples of a prompt, and which of them is the answer."""
