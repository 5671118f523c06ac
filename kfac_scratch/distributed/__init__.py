"""KFAC in several processes: joint curvature, work that is shared out, and failures with names."""
