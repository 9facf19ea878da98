"""The integer reference: a model's own forward on whole numbers."""
