"""loop: the autoregressive loop, from waiting requests to finished generations."""
