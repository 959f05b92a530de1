"""Records `examples.binary_perceptron`: `python -m benchmarks.binary_perceptron --json ...`."""

import time
from pathlib import Path

from benchmarks import record
from examples import binary_perceptron as example


def main() -> None:
    """Runs the example with its own flags, and writes every number to a file."""
    parser = example.make_parser()
    parser.prog = "python -m benchmarks.binary_perceptron"
    parser.add_argument("--json", type=Path, required=True, help="where every number goes")
    settings = parser.parse_args()
    begin = time.perf_counter()
    arms = example.run(settings)
    results = {
        "seconds": time.perf_counter() - begin,
        "seeds": list(range(settings.first_seed, settings.first_seed + settings.seeds)),
        "inputs": settings.inputs,
        "load": settings.load,
        "evaluations": settings.evaluations,
        "shares": list(example.SHARES),
        "arms": arms,
    }
    record.write(settings.json, results)


if __name__ == "__main__":
    main()
