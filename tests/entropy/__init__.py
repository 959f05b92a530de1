"""Tests: local entropy."""
