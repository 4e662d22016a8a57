"""Layers with a contraction of their own: tensor trains, block tensor trains, Kronecker sums, tensor rings."""
