"""Tests: measures."""
