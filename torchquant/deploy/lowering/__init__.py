"""From a calibrated model to what a file holds: grids, codes, and the model that is exported."""
