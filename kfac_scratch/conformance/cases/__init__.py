"""What is asked: networks, losses and data, in families named by the theorem that holds."""
