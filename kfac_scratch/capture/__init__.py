"""Capture: from a network and a batch to the `LayerIO` of every layer."""
