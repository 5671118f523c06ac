"""Curvature in use: what a curvature matrix is for, beside training.

One scale holds for all of it: a matrix belongs to the *sum* of the losses over the data, and a
prior precision is the weight decay of that sum.
"""
