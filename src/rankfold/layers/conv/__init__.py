"""Convolutions: SVD, CP and Tucker, and the order in which their stages are computed."""
