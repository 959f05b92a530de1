"""Tests: training loops."""
