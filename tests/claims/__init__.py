"""Tests of `benchmarks.claims`."""
