"""The vectors, read by code that has nothing of this package: NumPy alone, and JAX."""
