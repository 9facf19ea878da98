"""Measure sensitivity, and assign options within budgets."""
