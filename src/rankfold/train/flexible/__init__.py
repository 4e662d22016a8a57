"""Flexible activations: replace a block of a network by one flexible layer."""
