"""Layers that stand for a block: neurons with activation functions of their own."""
