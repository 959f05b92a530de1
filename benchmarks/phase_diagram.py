"""Records what `examples.phase_diagram` finds: `python -m benchmarks.phase_diagram --json ...`."""

import time
from pathlib import Path

from benchmarks import record
from examples import phase_diagram


def main() -> None:
    """Runs the example with its own flags, and writes every number to a file."""
    parser = phase_diagram.make_parser()
    parser.prog = "python -m benchmarks.phase_diagram"
    parser.add_argument("--json", type=Path, required=True, help="where every number goes")
    settings = parser.parse_args()
    begin = time.perf_counter()
    results = phase_diagram.run(settings)
    record.write(settings.json, {"seconds": time.perf_counter() - begin, **results})


if __name__ == "__main__":
    main()
