"""Tests: curves and landscapes."""
