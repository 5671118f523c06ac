"""Matrices: one file for each kind of structure, and their damped inverses."""
