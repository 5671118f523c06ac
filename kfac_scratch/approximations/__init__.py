"""Approximations: one file for each paper, each a function of `LayerIO`."""
