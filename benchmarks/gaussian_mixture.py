"""Records `examples.gaussian_mixture`: `python -m benchmarks.gaussian_mixture --json ...`."""

import time
from pathlib import Path

from benchmarks import record
from examples import gaussian_mixture as example


def main() -> None:
    """Runs the example with its own flags, and writes every number to a file."""
    parser = example.make_parser()
    parser.prog = "python -m benchmarks.gaussian_mixture"
    parser.add_argument("--json", type=Path, required=True, help="where every number goes")
    settings = parser.parse_args()
    begin = time.perf_counter()
    arms = example.run(settings)
    results = {
        "seconds": time.perf_counter() - begin,
        "seeds": list(range(settings.first_seed, settings.first_seed + settings.seeds)),
        "evaluations": settings.evaluations,
        "arms": arms,
    }
    record.write(settings.json, results)


if __name__ == "__main__":
    main()
