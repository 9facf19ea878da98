"""The integer reference: the model's own forward, run on integers."""
