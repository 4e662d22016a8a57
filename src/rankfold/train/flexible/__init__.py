"""Flexible activations: a block of a network decoupled into one flexible layer."""
