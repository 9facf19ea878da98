"""Schemes and widths that are learned beside the weights."""
