"""The command line: `python -m benchmarks.compare --help`."""

import sys

from benchmarks.compare.program import main

sys.exit(main())
