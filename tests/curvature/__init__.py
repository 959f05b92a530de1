"""Tests: curvature in Kronecker factors."""
