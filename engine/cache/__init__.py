"""cache: where keys and values lie, and what one forward pass is fed of them."""
