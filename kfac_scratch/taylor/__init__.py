"""Taylor mode: derivatives of any order through a network, in one forward pass."""
