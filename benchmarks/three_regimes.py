"""Records what `examples.three_regimes` finds: `python -m benchmarks.three_regimes --json ...`."""

import time
from pathlib import Path

from benchmarks import record
from examples import three_regimes


def main() -> None:
    """Runs the example with its own flags, and writes every number to a file."""
    parser = three_regimes.make_parser()
    parser.prog = "python -m benchmarks.three_regimes"
    parser.add_argument("--json", type=Path, required=True, help="where every number goes")
    settings = parser.parse_args()
    begin = time.perf_counter()
    results = three_regimes.run(settings)
    record.write(settings.json, {"seconds": time.perf_counter() - begin, **results})


if __name__ == "__main__":
    main()
