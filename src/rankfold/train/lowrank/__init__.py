"""Training towards low rank: SVD training and its relatives, on one interface."""
