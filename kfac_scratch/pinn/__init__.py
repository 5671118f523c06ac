"""PINNs: differential equations as losses, and KFAC for them."""
