"""Measurements of flatopt, and the results they gave."""
