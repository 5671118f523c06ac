"""The oracle tested: mutants of this package, and the bug museum."""
