"""Well-known mistakes, tried on a case's answer: see `catalogue`."""
