"""Mismatches, each traced to its cause and proven by a patch."""
