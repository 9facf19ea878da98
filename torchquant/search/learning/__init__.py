"""Learn schemes and widths together with the weights."""
