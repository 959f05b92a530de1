"""Tests: replicas."""
