"""PINNs: differential equations as data, and KFAC for them."""
