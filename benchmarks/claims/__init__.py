"""The claims of the papers, measured with every arm tuned alike: `python -m benchmarks.claims`."""
