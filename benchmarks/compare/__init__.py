"""The methods side by side on real images: `python -m benchmarks.compare`."""
