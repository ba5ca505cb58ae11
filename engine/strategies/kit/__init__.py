"""kit: what a strategy is written with, beside States."""
