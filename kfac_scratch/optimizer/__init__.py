"""The optimizer, and what controls its steps."""
