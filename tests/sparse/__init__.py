"""Tests: sparse training."""
