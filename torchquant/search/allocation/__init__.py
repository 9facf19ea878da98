"""Sensitivity, and the assignment of options within budgets."""
