"""Layers in SVD form, U diag(s) V, as they are trained towards low rank."""
