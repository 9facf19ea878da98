"""Networks with real weights that install from the registry, and inputs for them."""
