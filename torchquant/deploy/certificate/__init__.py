"""Certify that an exported file computes the codes of the model."""
