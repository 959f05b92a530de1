"""Tests: what every method owes."""
