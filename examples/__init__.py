"""Runnable examples; `python -m examples.compare` is the first to try."""
