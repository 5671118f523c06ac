"""Figures that a reader can move: drawn in full by Python, moved by a script of the site."""
