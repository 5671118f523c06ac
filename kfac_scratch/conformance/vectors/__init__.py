"""Vectors `kfac-vectors/1`: cases as files that any language can read."""
