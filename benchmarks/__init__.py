"""Measurements behind the tables of the documentation; each script writes its results as JSON."""
