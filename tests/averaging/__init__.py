"""Tests: averages."""
