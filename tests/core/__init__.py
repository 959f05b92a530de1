"""Tests: mechanisms."""
