"""Layers that replace a whole block: neurons that each have an activation function of their own."""
