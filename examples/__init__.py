"""Programs to read and to copy from: `python -m examples.sam_plain` is the first."""
