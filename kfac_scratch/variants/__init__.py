"""Better and faster: one file per paper, each a function of `LayerIO`."""
