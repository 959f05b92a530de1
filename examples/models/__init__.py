"""Small Flax models that the examples and benchmarks share."""
