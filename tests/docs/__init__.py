"""Tests: documentation."""
