"""Lower a calibrated model to the contents of a file: grids, codes, and the model that is exported."""
