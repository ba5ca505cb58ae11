"""params: what one request may ask for, under every name that the field uses."""
