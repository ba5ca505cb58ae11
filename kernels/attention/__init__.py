"""attention: decode attention over paged keys and values."""
