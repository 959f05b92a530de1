"""The command line: `python -m benchmarks.claims --help`."""

from benchmarks.claims.registry import CLAIMS
from benchmarks.claims.run import main

if __name__ == "__main__":
    raise SystemExit(main(CLAIMS))
