"""Tests: the sphere."""
