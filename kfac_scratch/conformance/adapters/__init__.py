"""Adapters: this package, and other people's implementations."""
