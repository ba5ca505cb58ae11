"""degeneration: tokens that keep a text from repeating itself or going astray."""
