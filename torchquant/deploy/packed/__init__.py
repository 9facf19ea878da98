"""Packed files: weights as codes of their true width, and what files weigh."""
