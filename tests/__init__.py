"""Tests of flatopt."""
