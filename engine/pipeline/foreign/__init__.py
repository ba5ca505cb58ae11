"""foreign: processors that other libraries define."""
